"""Law 1: with compression off, every road is bit-identical to the family's plain model."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from transformers import modeling_utils

from tests.fixtures.logs import warnings_of
from tests.fixtures.tiny import FAMILIES, LLAMA, ragged_prompts

from .cases import (
    ATTENTIONS,
    FAMILY_FIELDS,
    MERGES,
    POSITIONS,
    Case,
    assert_identical,
    build,
    model_of,
    plain_of,
    plain_outcome,
)
from .roads import ROADS

# How compression is switched off: configuration fields, and arguments of the call.
OFF = {
    "argument": ({}, {"compression": False}),
    "ratio of one": ({}, {"target_ratio": 1}),
    "configured ratio of one": ({"target_ratio": 1.0}, {}),
    "short prompt": ({"min_prompt_length": 1000}, {}),
    "configuration": ({"compression": False}, {}),
}
NEEDS_2D_INDEX = pytest.mark.skipif(
    not hasattr(modeling_utils, "slice_logits_to_keep"), reason="this Transformers knows no 2D `logits_to_keep`"
)
LENGTHS = (40, 23)
BACKENDS = [("eager", torch.float32), ("sdpa", torch.float32), ("eager", torch.bfloat16), ("sdpa", torch.bfloat16)]


@functools.cache
def off_model(case, off):
    return build(case, **OFF[off][0]) if OFF[off][0] else model_of(case)


def off_cells():
    """Every family and attention with the argument; every family in bfloat16, and with two of the other switches. Modes
    are spread over them, since nothing merges and no column moves, and no layer sees how the switch was thrown."""
    modes, backends = itertools.cycle(itertools.product(POSITIONS, MERGES)), itertools.cycle(ATTENTIONS)
    half = [(family, next(backends), torch.bfloat16, "argument") for family in FAMILIES]
    switches = itertools.cycle(off for off in OFF if off != "argument")
    others = [(family, next(backends), torch.float32, next(switches)) for family in FAMILIES for _ in range(2)]
    whole = itertools.product(FAMILY_FIELDS, ATTENTIONS, [torch.float32], ["argument"])
    for family, attention, dtype, off in [*whole, *half, *others]:
        case = Case(family, attention, *next(modes), dtype)
        for road in ROADS:
            # The configuration refuses to read again what is too short to be merged.
            if (off, road) != ("short prompt", "recompressed"):
                yield pytest.param(case, off, road, id=f"{case}-{off}-{road}")


@pytest.mark.parametrize(("case", "off", "road"), off_cells())
def test_off_is_the_plain_model(case, off, road, caplog):
    ours = ROADS[road].run(off_model(case, off), *ROADS[road].batch(), **OFF[off][1])
    assert_identical(ours, plain_outcome(case, road))
    # `generate` picks its cache before it sees how short the prompt is.
    assert off == "short prompt" or not warnings_of(caplog)


@pytest.mark.parametrize("road", [name for name, road in ROADS.items() if road.compresses and name != "pipeline"])
@pytest.mark.parametrize("family", FAMILY_FIELDS)
def test_on_is_not_off(family, road):
    """The comparisons above are not empty: these roads compress once nothing forbids it."""
    case = Case(family)
    ours = ROADS[road].run(model_of(case), *ROADS[road].batch())
    theirs = plain_outcome(case, road)
    name = next(n for n in ("logits", "loss", "sequences_scores") if n in ours.tensors())
    assert not torch.equal(ours.tensors()[name], theirs.tensors()[name])
    if ours.cache is not None:
        assert ours.cache.physical_length() < theirs.cache.get_seq_length()


def some_labels(ids, mask):
    """Labels on a part of the tokens, so that the rest would be free to merge."""
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :30] = -100
    return labels


CALLS = {
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


def tensors(value):
    """All tensors of an output, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if hasattr(value, "layers"):
        return [t for layer in value.layers for t in (layer.keys, layer.values)]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in tensors(item)] if isinstance(value, (list, tuple)) else []


def assert_same_output(ours, theirs):
    assert type(ours) is tuple or list(ours.keys()) == list(theirs.keys())
    ours, theirs = tensors(ours), tensors(theirs)
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("off", OFF)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "call", [pytest.param(c, marks=NEEDS_2D_INDEX) if c in ("rows of logits", "mask of logits") else c for c in CALLS]
)
@torch.no_grad()
def test_forward(family, off, call):
    """Whatever else `forward` takes; the fields of the output, too."""
    # The dtype follows the switch: neither sees the other.
    case = Case(family, dtype=torch.bfloat16 if off == "argument" else torch.float32)
    ids, mask = ragged_prompts(LENGTHS)
    arguments = CALLS[call](ids, mask)
    ours = off_model(case, off)(ids, attention_mask=mask, **arguments, **OFF[off][1])
    assert_same_output(ours, plain_of(case)(ids, attention_mask=mask, **arguments))


@pytest.mark.parametrize("off", OFF)
@pytest.mark.parametrize("family", FAMILIES)
def test_attentions(family, off):
    case = Case(family, "eager")
    ids, mask = ragged_prompts(LENGTHS)
    arguments = {"attention_mask": mask, "logits_to_keep": 1, "output_attentions": True}
    ours = off_model(case, off)(ids, **arguments, **OFF[off][1])
    theirs = plain_of(case)(ids, **arguments)
    assert len(ours.attentions) == LLAMA["num_hidden_layers"]
    assert_same_output(ours.attentions, theirs.attentions)


@pytest.mark.parametrize(
    "arguments", [{}, {"use_cache": False}, {"output_hidden_states": True}, {"return_dict": False}], ids=str
)
@pytest.mark.parametrize(("attention", "dtype"), BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_base_model_by_default(family, attention, dtype, arguments):
    case = Case(family, attention, dtype=dtype)
    ids, mask = ragged_prompts(LENGTHS)
    ours, theirs = (twin.base_model(ids, attention_mask=mask, **arguments) for twin in (model_of(case), plain_of(case)))
    assert_same_output(ours, theirs)
