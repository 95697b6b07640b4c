"""Stage 2: each segmenter against a plain loop that says the same."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from semtoken_hf.span_clustering import (
    Spans,
    bisect_rank,
    boundary_spans,
    capped_spans,
    count_per_segment,
    greedy_spans,
    shifted_similarities,
    split_long_spans,
    uniform_spans,
)

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)


def stream(lengths: list[int], free: float, seed: int) -> tuple[Tensor, Tensor, torch.Generator]:
    """Segment and mergeable of a stream whose tokens may join the one before them with probability `free`."""
    generator = torch.Generator().manual_seed(seed)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long))
    mergeable = torch.rand(len(segment), generator=generator) < free
    mergeable[:1] = False
    mergeable[1:] &= segment[1:] == segment[:-1]
    return segment, mergeable, generator


def free_runs(starts: list[bool]) -> list[tuple[int, int]]:
    """(first, length) of the spans that begin where `starts` is True."""
    first = [i for i, s in enumerate(starts) if s]
    return [(a, b - a) for a, b in zip(first, [*first[1:], len(starts)], strict=True)]


def cut_evenly(starts: list[bool], cap: int) -> list[bool]:
    """Every span longer than `cap` in the fewest pieces of nearly equal length."""
    out = list(starts)
    for first, length in free_runs(starts):
        pieces = -(-length // cap)
        for k in range(1, pieces):
            out[first - (-k * length // pieces)] = True
    return out


def greedy_walk(similarities: list[list[float]], tau: list[float], mergeable: list[bool], cap: int) -> list[bool]:
    """Algorithm 1 of the paper, token by token; similarities[s - 1][i] is cos(h_i, h_{i+s})."""
    starts, anchor = [False] * len(mergeable), 0
    while anchor < len(mergeable):
        starts[anchor] = True
        end = anchor + 1
        while end < len(mergeable) and end - anchor < cap and mergeable[end]:
            if not similarities[end - anchor - 1][anchor] > tau[anchor]:
                break
            end += 1
        anchor = end
    return starts


@given(st.lists(st.integers(1, 60), max_size=4), st.integers(1, 12), st.floats(0, 1), seeds)
@PROPERTY
def test_greedy_equals_the_walk(lengths: list[int], cap: int, free: float, seed: int) -> None:
    segment, mergeable, generator = stream(lengths, free, seed)
    # Twenty-one values, so that a similarity is often equal to the threshold.
    similarities = torch.randint(-10, 11, (cap - 1, len(segment)), generator=generator) / 10
    tau = (torch.randint(-10, 11, (max(len(lengths), 1),), generator=generator) / 10)[segment]
    starts = greedy_spans(similarities, tau, mergeable)
    assert starts.dtype == torch.bool
    assert starts.tolist() == greedy_walk(similarities.tolist(), tau.tolist(), mergeable.tolist(), cap)


@given(st.lists(st.integers(1, 60), max_size=4), st.integers(1, 12), st.floats(0, 1), seeds)
@PROPERTY
def test_capped_spans_are_greedy_where_all_cosines_pass(lengths: list[int], cap: int, free: float, seed: int) -> None:
    _, mergeable, _ = stream(lengths, free, seed)
    greedy = greedy_spans(torch.zeros(cap - 1, len(mergeable)), torch.full((len(mergeable),), -1.0), mergeable)
    assert torch.equal(capped_spans(mergeable, cap), greedy)


@given(st.integers(0, 40), st.integers(0, 9), seeds)
@PROPERTY
def test_spans_of_a_bounded_number(tokens: int, more: int, seed: int) -> None:
    starts = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) < 0.4
    starts[:1] = True
    exact, count = Spans.from_starts(starts), int(starts.sum())
    bounded = Spans.from_starts(starts, count + more)
    assert torch.equal(bounded.index, exact.index)
    assert bounded.first.tolist() == exact.first.tolist() + [tokens] * more
    assert bounded.lengths.tolist() == exact.lengths.tolist() + [0] * more


@pytest.mark.parametrize("tokens", [0, 1, 2, 127, 128, 200])
@pytest.mark.parametrize("cap", [1, 2, 200])
def test_greedy_at_the_extremes(tokens: int, cap: int) -> None:
    mergeable = torch.arange(tokens) > 0
    everything = torch.zeros(cap - 1, tokens)
    apart = greedy_spans(everything, torch.zeros(tokens), mergeable)
    assert apart.all()
    merged = greedy_spans(everything, torch.full((tokens,), -0.1), mergeable)
    assert merged.nonzero().squeeze(1).tolist() == list(range(0, tokens, cap))


@given(st.integers(0, 30), st.integers(0, 9), seeds)
@PROPERTY
def test_shifted_similarities_are_cosines(tokens: int, reach: int, seed: int) -> None:
    fingerprints = torch.randn(tokens, 5, generator=torch.Generator().manual_seed(seed))
    similarities = shifted_similarities(fingerprints, reach)
    products = fingerprints @ fingerprints.T
    assert similarities.shape == (reach, tokens)
    for shift, i in itertools.product(range(1, reach + 1), range(tokens)):
        expected = products[i, i + shift] if i + shift < tokens else torch.tensor(-torch.inf)
        assert torch.allclose(similarities[shift - 1, i], expected, atol=1e-5)


@given(st.lists(st.integers(1, 40), max_size=5), st.integers(1, 9), seeds)
@PROPERTY
def test_long_spans_are_cut_into_the_fewest_even_pieces(lengths: list[int], cap: int, seed: int) -> None:
    before = torch.zeros(sum(lengths), dtype=torch.bool)
    before[torch.tensor([0, *lengths]).cumsum(0)[:-1][: len(lengths)]] = True
    after = split_long_spans(before, torch.full((len(before),), cap))
    assert (after | ~before).all()
    pieces = Spans.from_starts(after)
    span_of_piece = Spans.from_starts(before).index[pieces.first].tolist()
    for number, length in enumerate(lengths):
        mine = [n for n, s in zip(pieces.lengths.tolist(), span_of_piece, strict=True) if s == number]
        assert len(mine) == -(-length // cap)
        assert max(mine) - min(mine) <= 1


def boundary_reference(
    similarity: list[float], mergeable: list[bool], lengths: list[int], budget: list[int], cap: int
) -> list[bool]:
    """Per segment: the most cuts, least similar neighbours first, whose spans of at most `cap` fit the budget."""
    starts, place = [], 0
    for length, allowed in zip(lengths, budget, strict=True):
        joints = sorted((i for i in range(length) if mergeable[place + i]), key=lambda i: (similarity[place + i], i))
        best = None
        for cuts in range(len(joints) + 1):
            cut = [not mergeable[place + i] or i in joints[:cuts] for i in range(length)]
            pieces = cut_evenly(cut, cap)
            if best is None or sum(pieces) <= allowed:
                best = pieces
        starts += best
        place += length
    return starts


@given(st.lists(st.integers(1, 25), min_size=1, max_size=4), st.integers(1, 8), st.floats(0, 1), seeds)
@PROPERTY
def test_boundary_equals_the_reference(lengths: list[int], cap: int, free: float, seed: int) -> None:
    segment, mergeable, generator = stream(lengths, free, seed)
    # Few values: ties are cut from the left.
    similarity = torch.randint(-5, 6, (len(segment),), generator=generator) / 5
    budget = torch.stack([torch.randint(1, n + 1, (), generator=generator) for n in lengths])
    starts = boundary_spans(similarity, mergeable, segment, budget, cap)
    expected = boundary_reference(similarity.tolist(), mergeable.tolist(), lengths, budget.tolist(), cap)
    assert starts.tolist() == expected


@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(1, 8), st.floats(0, 1), seeds)
@PROPERTY
def test_boundary_spends_the_budget_exactly(lengths: list[int], cap: int, free: float, seed: int) -> None:
    segment, mergeable, generator = stream(lengths, free, seed)
    similarity = torch.rand(len(segment), generator=generator) * 2 - 1
    budget = torch.stack([torch.randint(1, n + 1, (), generator=generator) for n in lengths])
    starts = boundary_spans(similarity, mergeable, segment, budget, cap)
    assert starts[~mergeable].all()
    assert Spans.from_starts(starts).lengths.max() <= cap
    fewest = count_per_segment(torch.tensor(cut_evenly((~mergeable).tolist(), cap)), segment, len(lengths))
    assert torch.equal(count_per_segment(starts, segment, len(lengths)), budget.maximum(fewest))


@given(st.integers(2, 9), st.floats(0.5, 1), seeds)
@PROPERTY
def test_boundary_cuts_are_the_least_similar_of_all_choices(tokens: int, free: float, seed: int) -> None:
    segment, mergeable, generator = stream([tokens], free, seed)
    similarity = torch.rand(tokens, generator=generator) * 2 - 1
    joints = mergeable.nonzero().squeeze(1).tolist()
    for cuts in range(len(joints) + 1):
        budget = torch.tensor([tokens - len(joints) + cuts])
        starts = boundary_spans(similarity, mergeable, segment, budget, tokens)
        chosen = (starts & mergeable).nonzero().squeeze(1).tolist()
        cost = {subset: similarity[list(subset)].sum().item() for subset in itertools.combinations(joints, cuts)}
        assert cost[tuple(chosen)] <= min(cost.values()) + 1e-6


@given(st.lists(st.integers(1, 80), min_size=1, max_size=4), st.integers(1, 9), st.floats(0.7, 1), seeds)
@PROPERTY
def test_uniform_spans_are_equal_and_within_the_budget(lengths: list[int], cap: int, free: float, seed: int) -> None:
    segment, mergeable, generator = stream(lengths, free, seed)
    budget = torch.stack([torch.randint(1, n + 1, (), generator=generator) for n in lengths])
    starts = uniform_spans(mergeable, segment, budget, cap)
    assert starts[~mergeable].all()
    fewest = count_per_segment(torch.tensor(cut_evenly((~mergeable).tolist(), cap)), segment, len(lengths))
    assert (count_per_segment(starts, segment, len(lengths)) <= budget.maximum(fewest)).all()
    for first, length in free_runs((~mergeable).tolist()):
        pieces = [n for _, n in free_runs(starts[first : first + length].tolist())]
        assert max(pieces) - min(pieces) <= 1
        assert max(pieces) <= cap


@given(st.integers(1, 200), st.integers(2, 8), st.integers(1, 200))
@PROPERTY
def test_uniform_spends_the_budget_of_one_run_exactly(tokens: int, cap: int, budget: int) -> None:
    segment, mergeable, _ = stream([tokens], 1.0, 0)
    budget = min(budget, tokens)
    starts = uniform_spans(mergeable, segment, torch.tensor([budget]), cap)
    assert starts.sum() == max(budget, -(-tokens // cap))


@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(0, 40), seeds)
@PROPERTY
def test_bisection_finds_the_largest_rank(budgets: list[int], highest: int, seed: int) -> None:
    steps = torch.randint(0, 3, (len(budgets), highest + 1), generator=torch.Generator().manual_seed(seed))
    counts = steps.cumsum(1)
    rank = bisect_rank(lambda r: counts.gather(1, r[:, None]).squeeze(1), torch.tensor(budgets), highest)
    fits = [[r for r in range(highest + 1) if row[r] <= b] for row, b in zip(counts.tolist(), budgets, strict=True)]
    assert rank.tolist() == [max(f, default=0) for f in fits]


def ragged(dtype: torch.dtype) -> tuple[Spans, Tensor]:
    lengths = torch.tensor([1, 5, 1, 3, 8, 2, 1])
    starts = torch.zeros(int(lengths.sum()), dtype=torch.bool)
    starts[lengths.cumsum(0) - lengths] = True
    spans = Spans.from_starts(starts)
    assert torch.equal(spans.lengths, lengths)
    assert torch.equal(spans.index, torch.repeat_interleave(torch.arange(7), lengths))
    return spans, torch.randn(len(starts), 4).to(dtype)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_span_means_and_their_gradient(dtype: torch.dtype, rtol: float) -> None:
    spans, values = ragged(dtype)
    values.requires_grad_()
    mean = spans.mean(values)
    assert mean.dtype == dtype
    rows = [values[a : a + n].double().mean(0) for a, n in zip(spans.first, spans.lengths, strict=True)]
    assert torch.allclose(mean, torch.stack(rows).to(dtype), rtol, atol=rtol)
    alone = spans.lengths == 1
    assert torch.equal(mean[alone], values[spans.first[alone]])
    weight = torch.randn_like(mean)
    (mean * weight).sum().backward()
    expected = (weight.double() / spans.lengths[:, None])[spans.index].to(dtype)
    assert torch.allclose(values.grad, expected, rtol, atol=rtol)


def test_long_means_are_summed_in_float32() -> None:
    values = torch.full((4096, 1), 1.0078125, dtype=torch.bfloat16)
    starts = torch.arange(4096) == 0
    assert Spans.from_starts(starts).mean(values).item() == 1.0078125


def test_no_tokens_at_all() -> None:
    nothing, none = torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.long)
    assert boundary_spans(torch.zeros(0), nothing, none, none, 8).numel() == 0
    assert uniform_spans(nothing, none, none, 8).numel() == 0
    assert greedy_spans(torch.zeros(7, 0), torch.zeros(0), nothing).numel() == 0
    spans = Spans.from_starts(nothing)
    assert len(spans) == 0
    assert spans.mean(torch.zeros(0, 3)).shape == (0, 3)
