"""Stage 3: entropy, budgets, the solved threshold, and what is left of the budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from semtoken_hf.granularity import (
    CompressionBudget,
    find_span_starts,
    segment_budgets,
    solve_threshold,
    span_entropy,
    spend_budget,
)
from semtoken_hf.span_clustering import Spans, count_per_segment, greedy_spans
from semtoken_hf.token_layout import TokenLayout
from tests.fixtures.layouts import trimmed_layout
from tests.fixtures.tiny import random_ids, tiny_model

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)
LOWEST = -1.001


def granularity(**fields: Any) -> CompressionBudget:
    defaults = {
        "target_ratio": 2.4,
        "max_slots": None,
        "similarity_threshold": None,
        "entropy_threshold": None,
        "max_span_length": 8,
        "min_prompt_length": 0,
        "segmentation_mode": "greedy",
    }
    return CompressionBudget(**{**defaults, **fields})


def segments_of(lengths: list[int], free: float = 1.0, seed: int = 0) -> TokenLayout:
    """One segment of each length, whose tokens may merge with probability `free`."""
    generator = torch.Generator().manual_seed(seed)
    valid = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    protected = torch.rand(valid.shape, generator=generator) >= free
    return trimmed_layout(valid, torch.zeros_like(valid), protected, 0, 0, 0)


def drifting(tokens: int, seed: int = 0, dim: int = 6) -> Tensor:
    """Unit fingerprints [N, D] whose neighbours resemble each other more or less."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(tokens, dim, generator=generator).cumsum(0) + 1e-3, dim=1)


def random_starts(tokens: int, seed: int) -> Tensor:
    starts = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) < 0.4
    starts[:1] = True
    return starts


@given(st.integers(1, 60), seeds)
@PROPERTY
def test_entropy_is_the_trace_of_the_covariance(tokens: int, seed: int) -> None:
    fingerprints, spans = drifting(tokens, seed), Spans.from_starts(random_starts(tokens, seed))
    parts = fingerprints.double().split(spans.lengths.tolist())
    expected = [p.T.cov(correction=0).trace() if len(p) > 1 else torch.tensor(0.0) for p in parts]
    entropy = span_entropy(fingerprints, spans)
    assert torch.allclose(entropy.double(), torch.stack(expected).double(), atol=1e-5)
    assert (entropy[spans.lengths == 1] == 0).all()
    assert ((entropy >= 0) & (entropy <= 1)).all()


@pytest.mark.parametrize(
    ("lengths", "fields", "budgets"),
    [
        ([24, 25, 240, 1], {}, [10, 11, 100, 1]),
        ([7, 8, 9], {"target_ratio": 4}, [2, 2, 3]),
        # In floating point, 21 / 1.4 is a little more than 15.
        ([21, 22, 336], {"target_ratio": 1.4}, [15, 16, 240]),
        ([100, 20], {"target_ratio": 1}, [100, 20]),
        ([10], {"target_ratio": 1000.0}, [1]),
        ([100, 20, 3], {"max_slots": 12}, [12, 9, 2]),
        ([100, 20, 3], {"target_ratio": None, "max_slots": 12}, [12, 12, 3]),
        ([15, 16, 17], {"min_prompt_length": 16}, [15, 7, 8]),
        ([15, 16], {"min_prompt_length": 16, "max_slots": 2}, [15, 2]),
        ([30], {"target_ratio": None}, [30]),
    ],
)
def test_budgets(lengths: list[int], fields: dict[str, Any], budgets: list[int]) -> None:
    assert segment_budgets(torch.tensor(lengths), granularity(**fields)).tolist() == budgets


def expected_fine(starts: Tensor, fingerprints: Tensor, layout: TokenLayout, budget: Tensor) -> list[bool]:
    """Per segment, spans in order of entropy stay fine up to the first that does not fit."""
    out, entropy = starts.tolist(), span_entropy(fingerprints, Spans.from_starts(starts)).tolist()
    spans = Spans.from_starts(starts)
    for number, allowed in enumerate(budget.tolist()):
        mine = [p for p in range(len(spans)) if layout.segment[spans.first[p]] == number]
        slack = allowed - len(mine)
        for p in sorted(mine, key=lambda p: (-entropy[p], p)):
            fine = min(max(slack, 0), int(spans.lengths[p]) - 1)
            slack -= int(spans.lengths[p]) - 1
            end = int(spans.first[p] + spans.lengths[p])
            out[end - fine : end] = [True] * fine
    return out


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), seeds)
@PROPERTY
def test_what_is_left_goes_to_the_highest_entropy(lengths: list[int], seed: int) -> None:
    layout, total = segments_of(lengths), sum(lengths)
    starts, fingerprints = random_starts(total, seed) | ~layout.mergeable, drifting(total, seed)
    generator = torch.Generator().manual_seed(seed)
    budget = torch.stack([torch.randint(1, n + 1, (), generator=generator) for n in lengths])
    fine = spend_budget(starts, fingerprints, layout, budget)
    assert fine.tolist() == expected_fine(starts, fingerprints, layout, budget)
    bounded = spend_budget(starts, fingerprints, layout, budget, most_spans=int(starts.sum()) + seed % 5)
    assert torch.equal(bounded, fine)
    before, after = (count_per_segment(s, layout.segment, len(lengths)) for s in (starts, fine))
    assert (after <= budget.maximum(before)).all()


@given(st.integers(2, 40), st.floats(0.3, 1), st.sampled_from([1.0, 0.5, -0.2]), seeds, st.integers(2, 4))
@PROPERTY
def test_the_solved_threshold_cannot_be_raised(tokens: int, free: float, highest: float, seed: int, cap: int) -> None:
    """Similarities on a grid that is wide beside the bisection's resolution: every partition can be listed."""
    layout, generator = segments_of([tokens], free, seed), torch.Generator().manual_seed(seed)
    similarities = torch.randint(-9999, 10_000, (cap - 1, tokens), generator=generator) / 10_000
    budget = torch.randint(1, tokens + 1, (1,), generator=generator)
    starts = solve_threshold(similarities, layout, budget, highest)

    levels = [LOWEST, *(level + 2e-5 for level in similarities.unique().tolist() if level < highest), highest]
    listed = [greedy_spans(similarities, torch.full((tokens,), tau), layout.mergeable) for tau in levels]
    fits = [bool(partition.sum() <= budget) for partition in listed]
    found = [k for k, partition in enumerate(listed) if torch.equal(partition, starts)]
    if not fits[0]:
        assert torch.equal(starts, listed[0])
    elif fits[-1]:
        assert len(listed) - 1 in found
    else:
        assert any(fits[k] and not fits[k + 1] for k in found)


@pytest.mark.parametrize("cosine", [-0.77, -0.123, 0.0, 0.3, 0.51, 0.949])
def test_the_solved_threshold_is_fine(cosine: float) -> None:
    """Two pairs, of which the budget asks for the more similar one."""
    similarities = torch.tensor([[cosine + 3e-5, -1.0, cosine, -torch.inf]])
    starts = solve_threshold(similarities, segments_of([4]), torch.tensor([3]), 1.0)
    assert starts.tolist() == [True, False, True, True]


def test_the_highest_threshold_itself_is_tried() -> None:
    starts = solve_threshold(torch.full((3, 9), 0.5), segments_of([9]), torch.tensor([9]), 0.5)
    assert starts.all()


@given(st.lists(st.integers(1, 40), min_size=2, max_size=4), seeds)
@PROPERTY
def test_each_segment_has_a_threshold_of_its_own(lengths: list[int], seed: int) -> None:
    layout, generator = segments_of(lengths), torch.Generator().manual_seed(seed)
    similarities = torch.rand((5, sum(lengths)), generator=generator)
    budget = torch.stack([torch.randint(1, n + 1, (), generator=generator) for n in lengths])
    together = solve_threshold(similarities, layout, budget, 1.0)
    place = 0
    for number, length in enumerate(lengths):
        part = slice(place, place + length)
        alone = solve_threshold(similarities[:, part], segments_of([length]), budget[number : number + 1], 1.0)
        assert torch.equal(together[part], alone)
        place += length


@pytest.mark.parametrize("mode", ["boundary", "greedy", "uniform"])
@pytest.mark.parametrize("ratio", [1.0, 1.3, 2.4, 5, 8])
def test_every_mode_honours_the_budget(mode: str, ratio: float) -> None:
    lengths = [100, 33, 1, 8]
    layout, budget = segments_of(lengths), torch.tensor([-(-n // ratio) for n in lengths]).long()
    starts = find_span_starts(drifting(142), layout, granularity(segmentation_mode=mode, target_ratio=ratio))
    kept = count_per_segment(starts, layout.segment, 4)
    assert (kept <= budget).all()
    if mode == "boundary":
        assert torch.equal(kept, budget)
    assert Spans.from_starts(starts).lengths.max() <= 8


@pytest.mark.parametrize("mode", ["boundary", "greedy"])
def test_spans_follow_the_meaning(mode: str) -> None:
    """Three topics of five tokens: three slots are exactly the topics."""
    topics = torch.eye(3)[torch.arange(15) // 5]
    fields = {"segmentation_mode": mode, "target_ratio": 5.0}
    starts = find_span_starts(topics, segments_of([15]), granularity(**fields))
    assert starts.nonzero().squeeze(1).tolist() == [0, 5, 10]


@pytest.mark.parametrize("delta", [None, 0.0, 0.05, 0.1, 1.0])
def test_threshold_mode_keeps_what_is_above_delta_fine(delta: float | None) -> None:
    layout, fingerprints, tau = segments_of([90, 40]), drifting(130), 0.5
    fields = {"target_ratio": None, "similarity_threshold": tau, "entropy_threshold": delta}
    starts = find_span_starts(fingerprints, layout, granularity(**fields))
    similarities = torch.stack([F.pad((fingerprints[s:] * fingerprints[:-s]).sum(1), (0, s)) for s in range(1, 8)])
    coarse = greedy_spans(similarities, torch.full((130,), tau), layout.mergeable)
    spans = Spans.from_starts(coarse)
    is_fine = span_entropy(fingerprints, spans) > (2 if delta is None else delta)
    assert torch.equal(starts, coarse | is_fine[spans.index])
    if delta in (None, 1.0):
        assert torch.equal(starts, coarse)
    elif delta == 0.0:
        assert starts.all()
    else:
        assert coarse.sum() < starts.sum() < 130


def test_a_threshold_beside_a_budget_is_the_start_of_the_search() -> None:
    """Where tau alone fits the budget, the spans are those at tau, and only the rest of the budget refines them."""
    layout, fingerprints = segments_of([120]), drifting(120)
    at_tau = find_span_starts(fingerprints, layout, granularity(target_ratio=None, similarity_threshold=0.9))
    kept = int(at_tau.sum())
    fields = {"target_ratio": None, "similarity_threshold": 0.9}
    assert torch.equal(find_span_starts(fingerprints, layout, granularity(**fields, max_slots=kept)), at_tau)
    refined = find_span_starts(fingerprints, layout, granularity(**fields, max_slots=kept + 20))
    assert refined[at_tau].all()
    assert kept < refined.sum() <= kept + 20
    assert find_span_starts(fingerprints, layout, granularity(**fields, max_slots=kept - 5)).sum() <= kept - 5


@pytest.mark.parametrize("mode", ["boundary", "greedy", "sentence", "uniform"])
def test_budgets_out_of_reach_merge_all_they_can_and_say_so(mode: str) -> None:
    model = tiny_model(segmentation_mode=mode, max_span_length=3, num_sink_tokens=2, recent_window=4)
    ids = random_ids(2, 64)
    prompt = model.compress(ids, target_ratio=8.0)
    # 58 tokens are free, three a slot; six are protected.
    assert prompt.kept_lengths.tolist() == [20 + 6] * 2
    assert not prompt.budget_met.any()
    prompt = model.compress(ids, target_ratio=64 / 26)
    assert prompt.budget_met.all()
    assert (prompt.kept_lengths <= 26).all()
