"""Each test here runs on the processor, where everybody has one, and on a GPU (`-m gpu`)."""

import pytest
import torch

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)


@pytest.fixture(params=["cpu", CUDA])
def device(request):
    return torch.device(request.param)


@pytest.fixture(params=[CUDA])
def cuda(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield
