"""Stage 2: where spans begin. Segmenters behind one idea: a bool tensor [N] that is True where a span starts.

- `greedy_spans`: the paper's Algorithm 1, exact and without a loop over tokens: run lengths for every possible
  anchor from L-1 shifted dot products, then pointer doubling marks the anchors that the walk visits.
- `capped_spans`: the same at a threshold that every cosine passes; no segmenter finds fewer spans.
- `boundary_spans`: cuts at the least similar neighbours; a total that grows by 0 or 1 with each further cut makes
  any budget exactly reachable.
- `uniform_spans`: equal spans, no fingerprints: the baseline that semantics has to beat.

All take `mergeable` (bool [N], may token i share a span with token i-1) and never join where it is False.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .token_layout import indices_where

# Rows at a time where a product of two [N, D] would else take the memory of a third.
ROWS_PER_CHUNK = 32768


@dataclass
class Spans:
    """Contiguous spans of a stream of N tokens: `index` int64 [N], span of each token; `first`, `lengths` int64 [P].

    Where only a bound of their number is known, empty spans follow the last: `first` N, `lengths` 0.
    """

    index: Tensor
    first: Tensor
    lengths: Tensor

    @classmethod
    def from_starts(cls, starts: Tensor, count: int | None = None) -> Spans:
        """Spans that begin where `starts` (bool [N]) is True.

        Args:
            count: how many there are, or more; None: the host waits for the device to learn it.
        """
        first = indices_where(starts, int(starts.sum()) if count is None else count)
        end = torch.full_like(first[:1], starts.numel())
        return cls(starts.long().cumsum(0) - 1, first, torch.cat([first, end]).diff())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Spans:
        """The spans on another device; `accelerate` calls it where a model is spread over several."""
        return Spans(*(getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)))

    def __len__(self) -> int:
        return self.first.numel()

    def mean(self, values: Tensor) -> Tensor:
        """Mean of `values` [N, D] over each span: [P, D] in the dtype of `values`, summed in at least float32."""
        wide = values if values.dtype == torch.float64 else values.float()
        return torch.segment_reduce(wide, "mean", lengths=self.lengths, axis=0, unsafe=True).to(values.dtype)


def count_per_segment(starts: Tensor, segment: Tensor, segments: int) -> Tensor:
    """Spans of each segment, int64 [S]."""
    return torch.zeros(segments, dtype=torch.long, device=starts.device).index_add_(0, segment, starts.long())


def row_products(left: Tensor, right: Tensor, index: Tensor | None = None) -> Tensor:
    """Dot product of every row of `left` [N, D] with its row of `right`, or with row `index` [N] of it: [N]."""
    parts = right if index is None else index
    chunks = zip(left.split(ROWS_PER_CHUNK), parts.split(ROWS_PER_CHUNK), strict=True)
    return torch.cat([(rows * (of if index is None else right[of])).sum(-1) for rows, of in chunks])


def shifted_similarities(fingerprints: Tensor, reach: int) -> Tensor:
    """Cosine of every token with the tokens 1 .. reach behind it in the stream.

    Args:
        fingerprints: float32 [N, D] of unit norm.
        reach: how far to look.

    Returns:
        float32 [reach, N]; entry [s - 1, i] is cos(h_i, h_{i+s}), and -inf past the end of the stream.
    """
    similarities = fingerprints.new_full((reach, len(fingerprints)), -torch.inf)
    for shift in range(1, min(reach, len(fingerprints) - 1) + 1):
        similarities[shift - 1, :-shift] = row_products(fingerprints[shift:], fingerprints[:-shift])
    return similarities


def greedy_spans(similarities: Tensor, threshold: Tensor, mergeable: Tensor) -> Tensor:
    """Greedy anchor clustering: a span grows from its anchor while cos(h_anchor, h_j) > tau, up to L tokens.

    Args:
        similarities: float32 [L - 1, N] from `shifted_similarities`.
        threshold: float32 [N], tau of each token's segment.
        mergeable: bool [N].

    Returns:
        bool [N], True where a span starts: equal to the sequential walk.
    """
    tokens = mergeable.numel()
    if tokens == 0:
        return ~mergeable
    grows = torch.ones_like(mergeable)
    run = torch.ones(tokens, dtype=torch.long, device=mergeable.device)
    for shift, similarity in enumerate(similarities[: max(tokens - 1, 0)], start=1):
        grows = grows & (similarity > threshold)
        grows[:-shift] &= mergeable[shift:]
        grows[-shift:] = False
        run += grows
    jump = (torch.arange(tokens, device=mergeable.device) + run).clamp(max=tokens)
    return _visited_from_zero(jump)


def capped_spans(mergeable: Tensor, max_length: int) -> Tensor:
    """As many tokens a span as may join, up to `max_length`: bool [N], `greedy_spans` where every cosine passes."""
    place = torch.arange(mergeable.numel(), device=mergeable.device)
    if not len(place):
        return ~mergeable
    return (place - place.where(~mergeable, 0).cummax(0).values) % max_length == 0


def _visited_from_zero(jump: Tensor) -> Tensor:
    """bool [N]: which nodes the walk 0 -> jump[0] -> ... visits, by pointer doubling over log2(N) rounds."""
    tokens = jump.numel()
    end = jump.new_full((1,), tokens)
    jump = torch.cat([jump, end])
    visited = torch.zeros_like(jump)
    visited[0] = 1
    for _ in range(max(tokens, 2).bit_length()):
        visited = (visited + torch.zeros_like(visited).index_add_(0, jump, visited)).clamp(max=1)
        jump = jump[jump]
    return visited[:-1].bool()


def split_long_spans(starts: Tensor, cap: Tensor) -> Tensor:
    """Cut every span longer than `cap` into the fewest pieces of nearly equal length.

    Args:
        starts: bool [N].
        cap: float or int [N], longest length allowed around each token (constant over a span).

    Returns:
        bool [N], a superset of `starts`.
    """
    tokens = starts.numel()
    if tokens == 0:
        return starts
    # Without `Spans`, whose size the host would have to wait for.
    place = torch.arange(tokens, device=starts.device)
    first = place.where(starts, 0).cummax(0).values
    end = place.where(starts, tokens).flip(0).cummin(0).values.flip(0).roll(-1)
    end[-1] = tokens
    length, offset = end - first, place - first
    pieces = torch.ceil(length / cap).long().clamp(min=1).minimum(length)
    return starts | (offset * pieces // length != (offset - 1) * pieces // length)


def bisect_rank(count_at: Callable[[Tensor], Tensor], budget: Tensor, highest: int) -> Tensor:
    """Largest rank of each segment in [0, highest] whose `count_at(rank)` is within `budget`, all int64 [S].

    `count_at` must not fall as the rank grows; 0 is returned where even that is too much.
    """
    low, high = torch.zeros_like(budget), torch.full_like(budget, highest)
    for _ in range(highest.bit_length()):
        middle = (low + high + 1) // 2
        fits = count_at(middle) <= budget
        low = torch.where(fits, middle, low)
        high = torch.where(fits, high, (middle - 1).maximum(low))
    return low


def boundary_spans(similarity: Tensor, mergeable: Tensor, segment: Tensor, budget: Tensor, max_length: int) -> Tensor:
    """Cut between the most dissimilar neighbours; each segment gets exactly `budget` spans where that is possible.

    Args:
        similarity: float32 [N], cosine of each token with the one before it.
        mergeable: bool [N].
        segment: int64 [N], segment of each token.
        budget: int64 [S], spans allowed in each segment.
        max_length: span cap L; a longer span is cut into equal pieces, which the total takes into account.

    Returns:
        bool [N], True where a span starts.
    """
    cap = torch.full_like(segment, max_length)
    rank = _rank_within_segment(similarity.where(mergeable, torch.inf), segment)

    def starts_at(cuts: Tensor) -> Tensor:
        return split_long_spans(~mergeable | (rank < cuts[segment]), cap)

    def count_at(cuts: Tensor) -> Tensor:
        return count_per_segment(starts_at(cuts), segment, len(budget))

    return starts_at(bisect_rank(count_at, budget, mergeable.numel()))


def _rank_within_segment(values: Tensor, segment: Tensor) -> Tensor:
    """0-based ascending rank of each value among those of its segment, ties in token order, int64 [N]."""
    order = values.sort(stable=True).indices
    order = order[segment[order].sort(stable=True).indices]
    place = torch.arange(values.numel(), device=values.device)
    rank = torch.empty_like(place)
    opens = torch.ones_like(place, dtype=torch.bool)
    sorted_segment = segment[order]
    opens[1:] = sorted_segment[1:] != sorted_segment[:-1]
    first = place.where(opens, 0).cummax(0).values
    rank[order] = place - first
    return rank


# Steps of span length between 1 and L that `uniform_spans` can choose from.
UNIFORM_RESOLUTION = 4096


def uniform_spans(mergeable: Tensor, segment: Tensor, budget: Tensor, max_length: int) -> Tensor:
    """Equal spans, as many as each segment's budget allows; arguments as in `boundary_spans`."""

    def starts_at(step: Tensor) -> Tensor:
        # Step 0 is the longest span, the last step single tokens.
        cap = max_length - (max_length - 1) * step / UNIFORM_RESOLUTION
        return split_long_spans(~mergeable, cap[segment])

    def count_at(step: Tensor) -> Tensor:
        return count_per_segment(starts_at(step), segment, len(budget))

    return starts_at(bisect_rank(count_at, budget, UNIFORM_RESOLUTION))


__all__ = [
    "Spans",
    "boundary_spans",
    "capped_spans",
    "count_per_segment",
    "greedy_spans",
    "row_products",
    "shifted_similarities",
    "uniform_spans",
]
