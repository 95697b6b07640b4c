"""Law 1: with compression off, every code path is bit-identical to the family's plain model."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import pytest
import torch
from transformers import AutoModel

from tests.fixtures.logs import warnings_of
from tests.fixtures.tiny import LLAMA, ragged_prompts, tiny_config, tiny_model

from .cases import (
    NEEDS_2D_INDEX,
    OTHERS,
    Case,
    assert_identical,
    build,
    case_of,
    each_cell,
    model_of,
    other_cases,
    plain_of,
    plain_outcome,
    spread_cases,
)
from .code_paths import CODE_PATHS

# How compression is switched off: configuration fields, and arguments of the call.
OFF = {
    "argument": ({}, {"compression": False}),
    "ratio of one": ({}, {"target_ratio": 1}),
    "configured ratio of one": ({"target_ratio": 1.0}, {}),
    "short prompt": ({"min_prompt_length": 1000}, {}),
    "configuration": ({"compression": False}, {}),
}
LENGTHS = (40, 23)
BASES = [(family, "eager", torch.bfloat16) for family in OTHERS]
BACKENDS = [("eager", torch.float32), ("sdpa", torch.float32), ("eager", torch.bfloat16), ("sdpa", torch.bfloat16)]


@functools.cache
def off_model(case, off):
    return build(case, **OFF[off][0]) if OFF[off][0] else model_of(case)


def off_cells():
    """Every code path on Llama with the argument in every attention, and with every other switch; other families,
    dtypes and switches on a fifth of them, in turn: no layer sees how the switch was thrown."""
    dtypes, switches = itertools.cycle([torch.float32, torch.bfloat16]), itertools.cycle(OFF)
    others = (replace(case, dtype=next(dtypes)) for case in other_cases())
    for number, code_path in enumerate(CODE_PATHS):
        chosen = [(case, "argument") for case in spread_cases() if case.family == "llama" and case.merge != "mean"]
        chosen += [(Case("llama"), off) for off in OFF if off != "argument"]
        turn = [(next(others), next(switches)) for _ in OTHERS]
        chosen += [pair for place, pair in enumerate(turn) if (place + number) % 5 == 0]
        for case, off in chosen:
            # The configuration refuses to read again what is too short to be merged.
            if (off, code_path) != ("short prompt", "recompressed"):
                yield pytest.param(case, off, code_path, id=f"{case}-{off}-{code_path}")


@pytest.mark.parametrize(("case", "off", "code_path"), off_cells())
def test_off_is_the_plain_model(case, off, code_path, caplog):
    ours = CODE_PATHS[code_path].run(off_model(case, off), *CODE_PATHS[code_path].batch(), **OFF[off][1])
    assert_identical(ours, plain_outcome(case, code_path))
    # `generate` picks its cache before it sees how short the prompt is.
    assert off == "short prompt" or not warnings_of(caplog)


@each_cell(
    [name for name, code_path in CODE_PATHS.items() if code_path.compresses and name not in ("pipeline", "all logits")]
)
def test_on_is_not_off(case, code_path):
    """The comparisons above are not empty: these code paths compress once nothing forbids it."""
    ours = CODE_PATHS[code_path].run(model_of(case), *CODE_PATHS[code_path].batch())
    theirs = plain_outcome(case, code_path)
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


def forward_cells():
    """Every call of Llama with every switch; every other family with two calls."""
    chosen = list(itertools.product(["llama"], OFF, CALLS))
    switches, calls = itertools.cycle(OFF), itertools.cycle(CALLS)
    chosen += [(family, next(switches), next(calls)) for family in OTHERS for _ in range(2)]
    for cell in chosen:
        yield pytest.param(*cell, marks=[NEEDS_2D_INDEX] if cell[2] in ("rows of logits", "mask of logits") else [])


@pytest.mark.parametrize(("family", "off", "call"), forward_cells())
@torch.no_grad()
def test_forward(family, off, call):
    """Whatever else `forward` takes; the fields of the output, too."""
    # The dtype follows the switch: neither sees the other.
    case = case_of(family, dtype=torch.bfloat16 if off == "argument" else torch.float32)
    ids, mask = ragged_prompts(LENGTHS)
    arguments = CALLS[call](ids, mask)
    ours = off_model(case, off)(ids, attention_mask=mask, **arguments, **OFF[off][1])
    assert_same_output(ours, plain_of(case)(ids, attention_mask=mask, **arguments))


@pytest.mark.parametrize(("family", "off"), [*itertools.product(["llama"], OFF), *zip(OTHERS, itertools.cycle(OFF))])
def test_attentions(family, off):
    case = case_of(family, "eager")
    ids, mask = ragged_prompts(LENGTHS)
    arguments = {"attention_mask": mask, "logits_to_keep": 1, "output_attentions": True}
    ours = off_model(case, off)(ids, **arguments, **OFF[off][1])
    theirs = plain_of(case)(ids, **arguments)
    assert len(ours.attentions) == LLAMA["num_hidden_layers"]
    assert_same_output(ours.attentions, theirs.attentions)


@pytest.mark.parametrize("arguments", [{}, {"output_hidden_states": True}, {"return_dict": False}], ids=str)
@pytest.mark.parametrize(("family", "attention", "dtype"), [("llama", *b) for b in BACKENDS] + BASES)
@torch.no_grad()
def test_base_model(family, attention, dtype, arguments):
    case = case_of(family, attention, dtype=dtype)
    ids, mask = ragged_prompts(LENGTHS)
    ours = model_of(case).base_model(ids, attention_mask=mask, compression=False, **arguments)
    assert_same_output(ours, plain_of(case).base_model(ids, attention_mask=mask, **arguments))


def test_the_output_is_of_one_kind():
    """Whether anything merges or not: the same class and fields, and a tuple of one length."""
    ids = ragged_prompts((60,))[0]
    for model in (tiny_model(), tiny_model().base_model):
        kept = {"logits_to_keep": 1} if model.base_model is not model else {}
        off, on = (model(ids, compression=compression, **kept) for compression in (False, True))
        assert type(off) is type(on)
        assert off.compressed_lengths is None
        assert on.compressed_lengths.tolist() == [25]
        off, on = (model(ids, compression=compression, return_dict=False, **kept) for compression in (False, True))
        assert len(off) == len(on) == 2


def test_a_base_model_alone_obeys_the_configuration():
    ids = ragged_prompts((60,))[0]
    assert AutoModel.from_config(tiny_config())(ids).last_hidden_state.shape[1] == 25
    assert AutoModel.from_config(tiny_config(compression=False))(ids).last_hidden_state.shape[1] == 60
    assert AutoModel.from_config(tiny_config())(ids[:, :12]).compressed_lengths is None
