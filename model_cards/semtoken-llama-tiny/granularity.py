"""Stage 3: which spans stay fine and which merge (SemToken, section 3.3).

- The sentence mode, the default, keeps whole sentences in the order of their relevance (`sentence_selection.py`).
- The greedy mode is the paper's. Semantic entropy of a span: H(T) = tr Cov{h_i : i in T}. With unit fingerprints this
  is 1 - |mean|^2, in [0, 1]. Budget: maximise the sum of H of the spans kept fine, subject to kept slots <= B. Spans
  are found at tau (lowered until merging all of them is enough); what is left goes to the highest entropies.
- The boundary and uniform modes reach the budget exactly by themselves and leave nothing to spend.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .sentence_selection import find_sentences, rank_tokens, selected_starts, sentence_relevance
from .span_clustering import (
    Spans,
    boundary_spans,
    capped_spans,
    count_per_segment,
    greedy_spans,
    shifted_similarities,
    uniform_spans,
)
from .token_layout import TokenLayout, distance_to_end

# Halvings of the interval of tau: the solved threshold is within 2 / 2**18 of the best one.
THRESHOLD_ROUNDS = 18


@dataclass(frozen=True)
class CompressionBudget:
    """How far to merge, and how: the fields of the same names of the configuration."""

    target_ratio: float | None
    max_slots: int | None
    similarity_threshold: float | None
    entropy_threshold: float | None
    max_span_length: int
    min_prompt_length: int
    segmentation_mode: str
    query_weight: float = 0.0

    @property
    def has_budget(self) -> bool:
        return self.target_ratio is not None or self.max_slots is not None


@dataclass(frozen=True)
class Text:
    """The tokens of a stream, for what fingerprints do not say.

    Attributes:
        input_ids: int64 [N].
        ends_sentence: bool [N], tokens that end a sentence or a line.
        query: bool [N], tokens of the question; None: nothing is asked.
    """

    input_ids: Tensor
    ends_sentence: Tensor
    query: Tensor | None = None


def segment_budgets(lengths: Tensor, granularity: CompressionBudget) -> Tensor:
    """Slots that each segment may keep, int64 [S]: ceil(n / ratio), at most `max_slots`, at least 1.

    A segment below `min_prompt_length` is not compressed and may keep all.
    """
    budget = lengths
    if granularity.target_ratio is not None:
        # float64 and a hair less, so that 24 / 2.4 is 10 and not 11.
        budget = torch.ceil(lengths.double() / granularity.target_ratio - 1e-9).long()
    if granularity.max_slots is not None:
        budget = budget.clamp(max=granularity.max_slots)
    budget = budget.clamp(min=1).minimum(lengths)
    return lengths.where(lengths < granularity.min_prompt_length, budget)


def slots_of_segments(layout: TokenLayout, granularity: CompressionBudget) -> Tensor:
    """Slots of each segment before any fingerprint is known, int64 [S].

    Every mode but the uniform one keeps exactly the budget, or, if joins are forbidden, the fewest spans there can be.
    """
    capped = capped_spans(layout.mergeable, granularity.max_span_length) & layout.is_token
    fewest = count_per_segment(capped, layout.segment, len(layout.lengths))
    return segment_budgets(layout.lengths, granularity).maximum(fewest)


def span_entropy(fingerprints: Tensor, spans: Spans) -> Tensor:
    """H = tr Cov of the unit fingerprints [N, D] of each span: float32 [P] in [0, 1]; 0 for single tokens."""
    norm = spans.mean(torch.linalg.vector_norm(fingerprints, dim=-1, keepdim=True).square()).squeeze(-1)
    entropy = norm - spans.mean(fingerprints).square().sum(-1)
    return entropy.clamp(min=0).where(spans.lengths > 1, 0.0)


def find_span_starts(
    fingerprints: Tensor | None,
    layout: TokenLayout,
    granularity: CompressionBudget,
    text: Text | None = None,
    most_spans: int | None = None,
) -> Tensor:
    """Where the slots of a stream begin.

    Args:
        fingerprints: float32 [N, D] of unit norm; None in uniform mode.
        layout: the stream's segments.
        granularity: ratio, thresholds and mode.
        text: what the sentence mode reads.
        most_spans: at least as many as the greedy spans before the budget is spent; None: the host waits to learn it.

    Returns:
        bool [N], True at the first token of every slot.
    """
    if granularity.segmentation_mode == "sentence":
        assert fingerprints is not None
        assert text is not None
        return _keep_sentences(text, fingerprints, layout, granularity)
    starts = candidate_starts(fingerprints, layout, granularity)
    if granularity.segmentation_mode != "greedy":
        return starts
    assert fingerprints is not None
    if not granularity.has_budget:
        return _keep_above_entropy(starts, fingerprints, granularity.entropy_threshold)
    budget = segment_budgets(layout.lengths, granularity)
    return spend_budget(starts, fingerprints, layout, budget, most_spans)


def _keep_sentences(text: Text, fingerprints: Tensor, layout: TokenLayout, granularity: CompressionBudget) -> Tensor:
    """The sentence mode: the question itself, then relevance to it and, among equals, what stands later."""
    sentence = find_sentences(text.ends_sentence, layout)
    last = layout.starts + layout.lengths - 1
    place = (sentence - sentence[layout.starts][layout.segment] + 1).double()
    worth = place / place[last][layout.segment]
    if granularity.query_weight and text.query is not None:
        relevance = sentence_relevance(text.input_ids, fingerprints, sentence, layout, text.query)
        worth = (worth + granularity.query_weight * relevance).where(~text.query, math.inf)
    forced = capped_spans(layout.mergeable, granularity.max_span_length)
    budget = segment_budgets(layout.lengths, granularity)
    return selected_starts(rank_tokens(worth, layout), forced, layout, budget)


def candidate_starts(fingerprints: Tensor | None, layout: TokenLayout, granularity: CompressionBudget) -> Tensor:
    """Where the spans begin whose entropies the greedy mode compares; in the other modes, where the slots do.

    Args and returns: as `find_span_starts`.
    """
    mergeable, mode, cap = layout.mergeable, granularity.segmentation_mode, granularity.max_span_length
    budget = segment_budgets(layout.lengths, granularity)
    if mode == "uniform":
        return uniform_spans(mergeable, layout.segment, budget, cap)
    assert fingerprints is not None
    if mode == "boundary":
        before = torch.zeros(len(mergeable), device=mergeable.device)
        before[1:] = shifted_similarities(fingerprints, 1)[0, :-1]
        return boundary_spans(before, mergeable, layout.segment, budget, cap)
    tau, similarities = granularity.similarity_threshold, shifted_similarities(fingerprints, cap - 1)
    if not granularity.has_budget:
        return greedy_spans(similarities, similarities.new_full((len(mergeable),), float(tau or 0.0)), mergeable)
    return solve_threshold(similarities, layout, budget, 1.0 if tau is None else tau)


def solve_threshold(similarities: Tensor, layout: TokenLayout, budget: Tensor, highest: float) -> Tensor:
    """Greedy spans at the highest tau <= `highest` found by bisection at which each segment fits its budget.

    Returns:
        bool [N], span starts; at tau = -1 where no tau fits (protected tokens and the span cap forbid it).
    """
    mergeable, segment = layout.mergeable, layout.segment

    def starts_at(tau: Tensor) -> Tensor:
        return greedy_spans(similarities, tau[segment], mergeable)

    def fits(tau: Tensor) -> Tensor:
        return count_per_segment(starts_at(tau), segment, len(budget)) <= budget

    # Just below -1, since a span grows where the cosine is strictly above tau.
    low = similarities.new_full(budget.shape, -1.0 - 1e-3)
    high = similarities.new_full(budget.shape, float(highest))
    low = torch.where(fits(high), high, low)
    for _ in range(THRESHOLD_ROUNDS):
        middle = (low + high) / 2
        ok = fits(middle)
        low, high = torch.where(ok, middle, low), torch.where(ok, high, middle)
    return starts_at(low)


def spend_budget(
    starts: Tensor,
    fingerprints: Tensor,
    layout: TokenLayout,
    budget: Tensor,
    most_spans: int | None = None,
) -> Tensor:
    """Keep the spans of highest entropy fine, in that order, as long as the segment's budget lasts.

    Of the span for which the budget no longer suffices, the last tokens stay fine: every slot is spent.
    """
    spans = Spans.from_starts(starts, most_spans)
    if len(spans) == 0 or len(starts) == 0:
        return starts
    entropy, span_segment = span_entropy(fingerprints, spans), layout.segment_at(spans.first)
    slack = budget - count_per_segment(starts, layout.segment, len(budget))
    order = entropy.sort(descending=True, stable=True).indices
    order = order[span_segment[order].sort(stable=True).indices]
    costs = (spans.lengths - 1).clamp(min=0)
    cost = costs[order]
    spent = cost.cumsum(0)
    per_segment = torch.zeros_like(budget).index_add_(0, span_segment, costs)
    before = spent - cost - (per_segment.cumsum(0) - per_segment)[span_segment[order]]
    fine = torch.zeros_like(order)
    fine[order] = (slack[span_segment[order]] - before).clamp(min=0).minimum(cost)
    to_end = distance_to_end(spans.index, spans.first, spans.lengths)
    return starts | (to_end < fine[spans.index])


def _keep_above_entropy(starts: Tensor, fingerprints: Tensor, threshold: float | None) -> Tensor:
    """Threshold mode: spans whose entropy is above delta stay fine."""
    spans = Spans.from_starts(starts)
    fine = span_entropy(fingerprints, spans) > (math.inf if threshold is None else threshold)
    return starts | fine[spans.index]


__all__ = [
    "CompressionBudget",
    "Text",
    "candidate_starts",
    "find_span_starts",
    "slots_of_segments",
    "span_entropy",
    "segment_budgets",
]
