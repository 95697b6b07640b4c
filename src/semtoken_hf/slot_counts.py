"""How many slots there will be, learned before the encoder runs: the one wait of the host for the device in the stage.

A budget says how many slots each segment keeps whatever the fingerprints are; only thresholds without a budget have
to wait a second time, for the spans they found.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .granularity import CompressionBudget, segment_budgets, slots_of_segments
from .token_layout import TokenLayout


@dataclass(frozen=True)
class SlotCounts:
    """Sizes of a plan, on the host.

    Attributes:
        tokens: of the stream, padding left out.
        segments: of the stream.
        windows: that the encoder reads.
        rows: slots of each row; None where only the fingerprints will tell.
        budgets_met: False where protected tokens or the span cap leave a row more slots than its budget.
        is_valid: whether a ready plan is one.
        ids_known: whether every token is of the vocabulary.
    """

    tokens: int
    segments: int
    windows: int
    rows: list[int] | None
    budgets_met: bool
    is_valid: bool
    ids_known: bool

    @property
    def most_spans(self) -> int | None:
        """No fewer than the greedy spans before the budget is spent; None where only the fingerprints will tell."""
        return None if self.rows is None else sum(self.rows)

    @property
    def most_merged(self) -> int:
        """No fewer than the slots of several tokens."""
        assert self.rows is not None
        return min(sum(self.rows), self.tokens - sum(self.rows))


def kept_per_row(starts: Tensor, row: Tensor, batch_size: int) -> Tensor:
    """Slots of each row, int64 [B], from bool [N] where they start and int64 [N] the row of each token."""
    return torch.zeros(batch_size, dtype=torch.long, device=row.device).index_add_(0, row, starts.long())


def budget_per_row(layout: TokenLayout, granularity: CompressionBudget, batch_size: int) -> Tensor:
    """Slots that each row may keep, int64 [B]; all of its tokens where there is no budget."""
    return _per_row(segment_budgets(layout.lengths, granularity), layout, batch_size)


def _per_row(values: Tensor, layout: TokenLayout, batch_size: int) -> Tensor:
    """Sum of `values` (int64 [S], 0 for empty segments) over the segments of each row."""
    row = layout.row[layout.starts.clamp(max=len(layout.row) - 1)]
    return values.new_zeros(batch_size).index_add_(0, row, values)


def count_slots(
    layout: TokenLayout,
    granularity: CompressionBudget,
    batch_size: int,
    windows: Tensor,
    starts: Tensor | None = None,
    is_valid: Tensor | None = None,
    is_known: Tensor | None = None,
) -> SlotCounts:
    """The counts of a layout that is not trimmed yet.

    Args:
        layout: its N tokens and what follows them.
        granularity: the budget.
        batch_size: rows of the batch.
        windows: int64 scalar, from `SemanticEncoder.count_windows`.
        starts: bool [N], where slots begin, if that is known already.
        is_valid: bool scalar, whether these starts are those of a valid plan.
        is_known: bool scalar, whether every token is of the vocabulary.
    """
    if starts is None:
        rows = _per_row(slots_of_segments(layout, granularity), layout, batch_size)
    else:
        rows = kept_per_row(starts & layout.is_token, layout.row, batch_size)
    met = (rows <= budget_per_row(layout, granularity, batch_size)).all()
    sizes = [layout.lengths.sum(), (layout.lengths > 0).sum(), windows.to(rows.device)]
    yes = torch.ones_like(sizes[0])
    flags = [met.long(), *(yes if flag is None else flag.long() for flag in (is_valid, is_known))]
    # Here the host waits.
    known = torch.cat([rows, torch.stack([*sizes, *flags])]).tolist()
    tokens, segments, read, *answers = known[batch_size:]
    rows_known = starts is not None or granularity.has_budget
    slots = known[:batch_size] if rows_known else None
    return SlotCounts(tokens, segments, read, slots, *map(bool, answers))


__all__ = ["SlotCounts", "count_slots", "kept_per_row"]
