"""Law 7: the same input gives the same plan and the same text: twice, on a copy, reloaded, and in every dtype."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.fixtures.tiny import BERT, random_ids, tiny_model

from .cases import assert_identical, each_case, each_cell, every_case, model_of, outcome_of
from .code_paths import CODE_PATHS

IDS = random_ids(2, 48)


@each_cell(CODE_PATHS)
def test_twice(case, code_path):
    """Nothing of a call stays behind: other code paths ran on this model in between."""
    assert_identical(
        CODE_PATHS[code_path].run(model_of(case), *CODE_PATHS[code_path].batch()), outcome_of(case, code_path)
    )


@functools.cache
def copy_of(case):
    return copy.deepcopy(model_of(case))


@each_cell(["labels", "training step", "greedy", "beams"])
def test_on_a_copied_model(case, code_path):
    """What is copied are weights: neither attention nor positions have any."""
    assert_identical(
        CODE_PATHS[code_path].run(copy_of(case), *CODE_PATHS[code_path].batch()), outcome_of(case, code_path)
    )


@each_case([case for case in every_case() if case.attention == "eager"])
def test_after_saving(case, tmp_path):
    model_of(case).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=case.attention).eval()
    for code_path in ("labels", "greedy"):
        assert_identical(CODE_PATHS[code_path].run(loaded, *CODE_PATHS[code_path].batch()), outcome_of(case, code_path))


@each_case(every_case())
def test_one_plan_for_every_dtype(case):
    """Slots, positions and what reaches the cache, by two code paths."""
    half = model_of(replace(case, dtype=torch.bfloat16))
    ids, mask = CODE_PATHS["greedy"].batch()
    ours, theirs = half.compress(ids, mask), model_of(case).compress(ids, mask)
    assert ours.inputs_embeds.dtype == torch.bfloat16
    assert {p.dtype for p in half.base_model.semantic_encoder.parameters()} == {torch.float32}
    for name in ("span_ids", "slot_lengths", "position_ids", "kept_lengths"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    slots = CODE_PATHS["kept logits"].run(half, ids, mask).cache.slot_lengths
    assert torch.equal(slots, outcome_of(case, "kept logits").cache.slot_lengths)


def is_frozen(model):
    encoder = model.base_model.semantic_encoder
    return not any(p.requires_grad for p in encoder.parameters()) and not any(m.training for m in encoder.modules())


def test_the_encoder_stays_frozen(tmp_path):
    model = tiny_model(encoder_config=dict(BERT), encoder_window=64)
    assert is_frozen(model)
    assert is_frozen(model.train())
    assert is_frozen(copy.deepcopy(model))
    assert model.base_model.layers[0].training
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert is_frozen(loaded)
    assert is_frozen(loaded.train())
    assert is_frozen(copy.deepcopy(loaded))
    assert all(p.requires_grad for n, p in loaded.named_parameters() if "semantic_encoder" not in n)
    assert torch.equal(loaded.eval().compress(IDS).span_ids, model.eval().compress(IDS).span_ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"])
def test_the_encoder_stays_float32(tmp_path, dtype):
    model = tiny_model(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    assert loaded.get_output_embeddings().weight.dtype == (torch.bfloat16 if dtype == "auto" else dtype)
    assert all(p.dtype == torch.float32 for p in loaded.base_model.semantic_encoder.parameters())
    # One plan for every dtype of the model.
    assert torch.equal(loaded.compress(IDS).span_ids, model.compress(IDS).span_ids)
