import gc
import time

import pytest
import torch

from semtoken_hf.gpu_suite import equivalence, measuring, products
from semtoken_hf.gpu_suite.parts import Context


@pytest.fixture(scope="session", autouse=True)
def quick_collections():
    """The parts collect garbage often: not among all that is imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """What is measured does not matter here: a few tokens do."""
    for module in (measuring, products):
        monkeypatch.setattr(module, "NEW_TOKENS", 4)
    monkeypatch.setattr(measuring, "REPETITIONS", 1)
    monkeypatch.setattr(equivalence, "STEPS", 2)
    with torch.no_grad():
        yield


@pytest.fixture
def context():
    return Context(torch.device("cpu"), torch.float32, ("tiny",), (256,), 1024, time.time() + 100)
