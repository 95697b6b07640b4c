"""A plan in figures."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from .details import REASONS, SpanDetails
from .page import row_of

# How the reasons are counted; what is left is protected or read.
MERGED, FINE = ("merged",), ("budget", "alone")


@dataclass(frozen=True)
class PlanSummary:
    """One row of one plan.

    Attributes:
        target_ratio: tokens per slot that were asked for, or None.
        tokens, slots: of the row.
        ratio: tokens per slot.
        budget: slots that it may keep; all tokens where there is no budget.
        budget_met: whether it keeps no more.
        merged_tokens, fine_tokens, protected_tokens: in slots with others; alone by choice; protected or read.
        longest: tokens of the longest slot.
        lengths: how many slots there are of each length.
        reasons: how many tokens there are of each reason.
    """

    target_ratio: float | None
    tokens: int
    slots: int
    ratio: float
    budget: int
    budget_met: bool
    merged_tokens: int
    fine_tokens: int
    protected_tokens: int
    longest: int
    lengths: dict[int, int]
    reasons: dict[str, int]


def summarise(plan: SpanDetails, row: int = 0) -> PlanSummary:
    """The figures of one row."""
    names = list(REASONS)
    reasons = Counter(names[code] for code in row_of(plan, "reason", row).tolist())
    spans = row_of(plan, "span_ids", row)
    lengths = Counter(spans.bincount().tolist())
    tokens, slots, budget = len(spans), sum(lengths.values()), int(plan.budget[row])
    merged, fine = (sum(reasons[name] for name in group) for group in (MERGED, FINE))
    return PlanSummary(
        target_ratio=plan.target_ratio,
        tokens=tokens,
        slots=slots,
        ratio=tokens / max(slots, 1),
        budget=budget,
        budget_met=slots <= budget,
        merged_tokens=merged,
        fine_tokens=fine,
        protected_tokens=tokens - merged - fine,
        longest=max(lengths, default=0),
        lengths=dict(sorted(lengths.items())),
        reasons={name: reasons[name] for name in names if reasons[name]},
    )


def notes_on(plans: list[SpanDetails], config: Any, has_question: bool) -> list[str]:
    """What a reader may wonder about."""
    found, summaries = [], [summarise(plan) for plan in plans]
    if not config.compression:
        found.append("compression is off in this configuration: the model merges nothing unless it is switched on")
    if (tokens := summaries[0].tokens) < config.min_prompt_length:
        found.append(
            f"{tokens} tokens are fewer than min_prompt_length ({config.min_prompt_length}): nothing merges; "
            "--set min_prompt_length=0 shows what would"
        )
    elif unmet := [summary for summary in summaries if not summary.budget_met]:
        ratios = ", ".join(f"{plan.target_ratio:g}" if plan.target_ratio else "the budget" for plan in unmet)
        found.append(f"not met: {ratios}; protected tokens or max_span_length ({config.max_span_length}) forbid it")
    if has_question and (config.segmentation_mode != "sentence" or not config.query_weight):
        found.append("the question stays whole but does not decide what else does: segmentation_mode, query_weight")
    return found


__all__ = ["PlanSummary", "notes_on", "summarise"]
