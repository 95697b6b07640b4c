"""Every attention backend over slots with gapped positions, against eager in float32."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend

from semtoken_hf.gpu_suite.equivalence import CASES, FIELDS, SHAPE, Backend, available_backends, read_and_decode
from semtoken_hf.gpu_suite.models import build_model
from semtoken_hf.gpu_suite.parts import attention
from semtoken_hf.varlen_semtoken import VARLEN

# Grouped heads and masks rule kernels out: then SDPA says so.
BACKENDS = {
    "sdpa": Backend("sdpa", "sdpa"),
    "sdpa math": Backend("sdpa math", "sdpa", SDPBackend.MATH),
    "flash_attention_2": Backend("flash_attention_2", "flash_attention_2"),
    VARLEN: Backend(VARLEN, VARLEN),
}


def backend_on(name, device):
    there = {backend.implementation for backend in available_backends(device)}
    if BACKENDS[name].implementation not in there:
        pytest.skip(f"{name} is not available on {device.type}")
    return BACKENDS[name]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
@pytest.mark.parametrize("name", BACKENDS)
def test_equals_eager_in_float32(name, case, device):
    backend = backend_on(name, device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = build_model(SHAPE, device, dtype, attn_implementation="eager", **FIELDS)
    exact = copy.deepcopy(model).float()
    reference, fed = read_and_decode(exact, case)
    by_eager, _ = read_and_decode(model, case, fed)
    with attention(model, backend.implementation, backend.kernel):
        logits, _ = read_and_decode(model, case, fed)
    tolerance = 2 * (by_eager - reference).abs().max() + 1e-4 * reference.abs().max()
    assert (logits - reference).abs().max() <= tolerance


def test_each_sdpa_kernel_that_takes_the_call(cuda):
    model = build_model(replace(SHAPE, num_key_value_heads=4), cuda, torch.bfloat16, **FIELDS)
    reference, fed = read_and_decode(copy.deepcopy(model).float(), CASES[0])
    by_default, _ = read_and_decode(model, CASES[0], fed)
    for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        with attention(model, "sdpa", kernel):
            logits, _ = read_and_decode(model, CASES[0], fed)
        tolerance = 2 * (by_default - reference).abs().max() + 1e-3 * reference.abs().max()
        assert (logits - reference).abs().max() <= tolerance, kernel


def test_off_is_the_plain_model_bit_for_bit(device):
    from tests.fixtures.tiny import plain_twin, ragged_prompts, tiny_model

    model = tiny_model(attn_implementation="sdpa")
    plain = plain_twin(model).to(device)
    model.to(device)
    ids, mask = (values.to(device) for values in ragged_prompts())
    mine = model(ids, attention_mask=mask, compression=False).logits
    assert torch.equal(mine, plain(ids, attention_mask=mask).logits)
