"""Law 1: with compression off, every output is bit-identical to `LlamaForCausalLM`."""

import functools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, modeling_utils

from tests.fixtures.tiny import LLAMA, plain_twin, ragged_prompts, random_ids, tiny_model

BACKENDS = [("eager", torch.float32), ("sdpa", torch.float32), ("eager", torch.bfloat16), ("sdpa", torch.bfloat16)]
# How compression is switched off: configuration fields, and arguments of the call.
OFF = {
    "argument": ({}, {"compression": False}),
    "ratio of one": ({}, {"target_ratio": 1}),
    "configured ratio of one": ({"target_ratio": 1.0}, {}),
    "short prompt": ({"min_prompt_length": 1000}, {}),
    "configuration": ({"compression": False}, {}),
}
GENERATION = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 50},
    "beams": {"num_beams": 4},
    "beams with returns": {"num_beams": 3, "num_return_sequences": 2},
    "sampled returns": {"do_sample": True, "num_return_sequences": 2},
    "chunked prefill": {"prefill_chunk_size": 7},
    "without cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
}
NEEDS_2D_INDEX = pytest.mark.skipif(
    not hasattr(modeling_utils, "slice_logits_to_keep"), reason="this Transformers knows no 2D `logits_to_keep`"
)
LENGTHS = (40, 23)


@functools.cache
def twins(off: str, attention: str, dtype: torch.dtype):
    model = tiny_model(dtype=dtype, attn_implementation=attention, **OFF[off][0])
    return model, plain_twin(model)


@pytest.fixture(params=BACKENDS, ids=lambda p: f"{p[0]}-{str(p[1]).split('.')[1]}")
def backend(request):
    return request.param


@pytest.fixture(params=list(OFF))
def pair(request, backend):
    """The model, its plain twin, and the arguments that switch compression off."""
    return *twins(request.param, *backend), OFF[request.param][1]


def tensors(value):
    """All tensors of an output, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if hasattr(value, "layers"):
        return [t for layer in value.layers for t in (layer.keys, layer.values)]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in tensors(item)] if isinstance(value, (list, tuple)) else []


def assert_identical(ours, theirs):
    ours, theirs = tensors(ours), tensors(theirs)
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def some_labels(ids, mask):
    """Labels on a part of the tokens, so that the rest would be free to merge."""
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :30] = -100
    return labels


CALLS = {
    "all logits": lambda ids, mask: {},
    "last logits": lambda ids, mask: {"logits_to_keep": 3},
    "more logits than tokens": lambda ids, mask: {"logits_to_keep": 99},
    "indexed logits": lambda ids, mask: {"logits_to_keep": torch.tensor([25, 38, -1])},
    "labels": lambda ids, mask: {"labels": some_labels(ids, mask)},
    "labels of a bigger batch": lambda ids, mask: {"labels": some_labels(ids, mask), "num_items_in_batch": 77},
    "all labels": lambda ids, mask: {"labels": ids},
    "kept labels": lambda ids, mask: {"labels": ids[:, -8:], "logits_to_keep": 8},
    "tuple": lambda ids, mask: {"logits_to_keep": 2, "return_dict": False},
    "no cache": lambda ids, mask: {"logits_to_keep": 2, "use_cache": False},
    "hidden states": lambda ids, mask: {"logits_to_keep": 2, "output_hidden_states": True},
    "rows of logits": lambda ids, mask: {"logits_to_keep": torch.tensor([[30, 39], [20, 39]])},
    "mask of logits": lambda ids, mask: {"logits_to_keep": some_labels(ids, mask) >= 0},
}


@pytest.mark.parametrize(
    "call", [pytest.param(c, marks=NEEDS_2D_INDEX) if c in ("rows of logits", "mask of logits") else c for c in CALLS]
)
def test_forward(pair, call):
    model, plain, off = pair
    ids, mask = ragged_prompts(LENGTHS)
    arguments = CALLS[call](ids, mask)
    with torch.no_grad():
        ours = model(ids, attention_mask=mask, **arguments, **off)
        theirs = plain(ids, attention_mask=mask, **arguments)
    assert type(ours) is tuple or list(ours.keys()) == list(theirs.keys())
    assert_identical(ours, theirs)


@pytest.mark.parametrize("off", OFF)
def test_attentions(off):
    model, plain = twins(off, "eager", torch.float32)
    ids, mask = ragged_prompts(LENGTHS)
    arguments = {"attention_mask": mask, "logits_to_keep": 1, "output_attentions": True}
    ours, theirs = model(ids, **arguments, **OFF[off][1]), plain(ids, **arguments)
    assert len(ours.attentions) == LLAMA["num_hidden_layers"]
    assert_identical(ours.attentions, theirs.attentions)


@pytest.mark.parametrize("off", OFF)
def test_gradients(off):
    model, plain = twins(off, "sdpa", torch.float32)
    ids, mask = ragged_prompts(LENGTHS)
    labels = some_labels(ids, mask)
    gradients = []
    for twin, arguments in ((model, OFF[off][1]), (plain, {})):
        twin.zero_grad()
        twin(ids, attention_mask=mask, labels=labels, **arguments).loss.backward()
        gradients.append([p.grad for n, p in twin.named_parameters() if "semantic_encoder" not in n])
    assert_identical(*gradients)


@pytest.mark.parametrize("mode", GENERATION)
def test_generate(pair, mode):
    model, plain, off = pair
    ids, mask = ragged_prompts(LENGTHS)
    arguments = {"attention_mask": mask, "max_new_tokens": 5, "return_dict_in_generate": True, "output_scores": True}
    outputs = []
    for twin, extra in ((model, off), (plain, {})):
        torch.manual_seed(3)
        outputs.append(twin.generate(ids, **arguments, **GENERATION[mode], **extra))
    ours, theirs = outputs
    assert list(ours.keys()) == list(theirs.keys())
    assert_identical(ours.sequences, theirs.sequences)
    assert_identical(ours.scores, theirs.scores)
    if mode != "without cache":
        assert_identical(ours.past_key_values, theirs.past_key_values)


@pytest.mark.parametrize("mode", ["prompt lookup", "assistant"])
def test_generate_with_drafts(pair, mode):
    model, plain, off = pair
    # A repeating prompt, so that looking back finds drafts.
    ids = random_ids(1, 12).repeat(1, 3)
    arguments = {"prompt_lookup_num_tokens": 4}
    if mode == "assistant":
        torch.manual_seed(1)
        assistant = LlamaForCausalLM(LlamaConfig(**{**LLAMA, "num_hidden_layers": 1})).eval().to(model.dtype)
        arguments = {"assistant_model": assistant}
    ours, theirs = (
        twin.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, **arguments, **extra)
        for twin, extra in ((model, off), (plain, {}))
    )
    assert_identical(ours, theirs)


@pytest.mark.parametrize(
    "arguments", [{}, {"use_cache": False}, {"output_hidden_states": True}, {"return_dict": False}]
)
def test_base_model_by_default(backend, arguments):
    model, plain = twins("argument", *backend)
    ids, mask = ragged_prompts(LENGTHS)
    with torch.no_grad():
        ours, theirs = (twin.model(ids, attention_mask=mask, **arguments) for twin in (model, plain))
    assert type(ours) is tuple or list(ours.keys()) == list(theirs.keys())
    assert_identical(ours, theirs)


def test_on_is_not_off(backend):
    """The inputs above do compress once nothing forbids it: the comparisons are not empty."""
    model, plain = twins("argument", *backend)
    ids, mask = ragged_prompts(LENGTHS)
    ours, theirs = (twin(ids, attention_mask=mask, logits_to_keep=1) for twin in (model, plain))
    assert not torch.equal(ours.logits, theirs.logits)
    assert ours.past_key_values.layers[0].keys.shape[2] < theirs.past_key_values.layers[0].keys.shape[2]
