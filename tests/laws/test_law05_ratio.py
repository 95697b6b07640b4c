"""Law 5: the ratio is honoured whenever protected tokens and the span cap allow it; else the result says so."""

from __future__ import annotations

import math

import pytest
import torch

from tests.fixtures.logs import warnings_of
from tests.fixtures.tiny import ragged_prompts, tiny_model

from .cases import FAMILY_FIELDS, RATIO, build, case_of, each_case, each_cell, model_of, outcome_of, spread_cases
from .code_paths import CODE_PATHS, LONG_STEPS, RECOMPRESS_EVERY, STEPS

MINIMUM, RECENT_WINDOW = 16, 4
CACHED = [
    name for name, code_path in CODE_PATHS.items() if code_path.compresses and name not in ("pipeline", "training step")
]


def budget(tokens, ratio=RATIO):
    return tokens if tokens < MINIMUM else math.ceil(tokens / ratio - 1e-9)


def expected_slots(code_path, length):
    """Slots of a row of so many tokens when the code path has ended."""
    if code_path == "kept logits":
        # What stands behind the first of three read positions is scored, and read itself.
        return budget(length - 2) + 2
    if code_path == "labels":
        # Scored tokens are slots of their own, 6 and 5; what predicts the first of a run ends the segment before it.
        return budget(length - 30) + 6 + budget(19) + 5 if length > 30 else budget(length - 5) + 5
    answer = STEPS - 1
    if code_path == "chat":
        # The last token of an answer is read with the next turn.
        return budget(length) + answer + budget(length // 2 + 1) + answer
    if code_path == "recompressed":
        # What stays whole at the end of what is read again comes on top of the ratio.
        again = math.ceil(RECOMPRESS_EVERY / RATIO) + RECENT_WINDOW
        return budget(length) + again + LONG_STEPS - 1 - (RECOMPRESS_EVERY + RECENT_WINDOW)
    return budget(length) + (7 if CODE_PATHS[code_path].is_drafting else answer)


@each_cell(CACHED)
def test_every_code_path_keeps_the_slots_it_may(case, code_path):
    lengths = [len(row) for row in CODE_PATHS[code_path].rows()]
    kept = outcome_of(case, code_path).cache.compressed_lengths
    expected = torch.tensor([expected_slots(code_path, n) for n in lengths])
    assert torch.equal(kept, expected.repeat_interleave(len(kept) // len(lengths)))


@pytest.mark.parametrize("target_ratio", [1.2, 3.0])
@each_case(spread_cases())
def test_ratio_of_a_call(case, target_ratio):
    ids, mask = CODE_PATHS["greedy"].batch()
    with torch.no_grad():
        kept = model_of(case)(ids, attention_mask=mask, logits_to_keep=1, target_ratio=target_ratio).compressed_lengths
    assert kept.tolist() == [budget(n, target_ratio) for n in (60, 37, 11)]


@pytest.mark.parametrize("family", FAMILY_FIELDS)
def test_a_ratio_out_of_reach_is_said(family, caplog):
    """A field and one warning; the slots are those that the span cap needs."""
    model = build(case_of(family), max_span_length=2)
    (ids, mask) = CODE_PATHS["greedy"].batch()
    prompt = model.compress(ids, mask, target_ratio=4.0)
    assert prompt.budget_met.tolist() == [False, False, True]
    assert prompt.budgets.tolist() == [budget(n, 4.0) for n in mask.sum(1).tolist()[:2]] + [int(mask[2].sum())]
    for _ in range(2):
        out = model.generate(ids, attention_mask=mask, target_ratio=4.0, max_new_tokens=1, return_dict_in_generate=True)
    assert torch.equal(out.past_key_values.compressed_lengths, prompt.kept_lengths)
    messages = [m for m in warnings_of(caplog) if "sliding_window" not in m]
    assert len(messages) == 1
    assert "budget_met" in messages[0]
    assert "`max_span_length` (2)" in messages[0]


LENGTHS = (96, 70, 41, 18, 9)


@pytest.mark.parametrize("segmentation", ["boundary", "greedy", "sentence", "uniform"])
@pytest.mark.parametrize("target_ratio", [1.2, 2, 2.4, 3.5])
def test_ratio_of_every_segmentation(segmentation, target_ratio):
    prompt = tiny_model(segmentation_mode=segmentation).compress(*ragged_prompts(LENGTHS), target_ratio=target_ratio)
    for kept, length in zip(prompt.kept_lengths[:4].tolist(), LENGTHS, strict=False):
        allowed = -(-length * 1000 // round(target_ratio * 1000))
        assert kept <= max(allowed, 10) if length == 18 else kept == allowed
    assert prompt.kept_lengths[4] == 9


@pytest.mark.parametrize("segmentation", ["boundary", "greedy", "sentence", "uniform"])
def test_a_budget_that_cannot_be_met(segmentation):
    """Spans of two at most, six tokens that stay whole."""
    model = tiny_model(max_span_length=2, segmentation_mode=segmentation)
    prompt = model.compress(*ragged_prompts(LENGTHS), target_ratio=4.0)
    assert prompt.budget_met.tolist() == [False, False, False, False, True]
    assert prompt.kept_lengths[0] == 6 + 45


def test_a_budget_that_is_met_is_quiet(caplog):
    prompt = tiny_model().compress(*ragged_prompts((96, 70)))
    assert prompt.budget_met.all()
    assert not caplog.records
