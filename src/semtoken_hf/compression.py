"""The compression stage as one call: ids and masks -> slots. The only place that knows the order of the stages."""

from __future__ import annotations

import logging
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .cache_semtoken import cache_bytes
from .configuration_semtoken import base_merge_mode
from .logging_semtoken import fallbacks, get_logger
from .semantic_encoder import SemanticEncoder
from .span_merging import LearnedMerger, merge_spans
from .span_planner import SpanPlan, plan_spans

logger = get_logger(__name__)


@dataclass(frozen=True, repr=False, eq=False)
class PromptOrigin:
    """What a prompt was made from; `semtoken_hf.inspection.details` reads off it why the plan is as it is.

    Attributes:
        plan: which tokens share a slot.
        config: the SemToken configuration of that call.
        input_ids: int64 [B, T].
        anchors: int64 [P], the token of the stream that each slot has its position from.
        positions: int64 [P], that position.
        planning: the other arguments of `plan_spans`.
    """

    plan: SpanPlan
    config: Any
    input_ids: Tensor
    anchors: Tensor
    positions: Tensor
    planning: dict[str, Any]


@dataclass(repr=False)
class CompressedPrompt:
    """Prompts of B rows and T tokens as M slots; rows are left-padded.

    Attributes:
        inputs_embeds: [B, M, H] slot embeddings, zero at padding.
        position_ids: int64 [B, M] rotary position of each slot, 0 at padding.
        attention_mask: int64 [B, M], 0 for padding.
        slot_lengths: int64 [B, M], tokens that each slot stands for, 0 for padding.
        span_ids: int64 [B, T], slot of every token counted from 0 in its row, -1 for padding. Token t of row b lies
            in column `M - kept_lengths[b] + span_ids[b, t]`.
        original_lengths: int64 [B], tokens of each row.
        kept_lengths: int64 [B], slots of each row.
        budgets: int64 [B], slots that the ratio and `max_slots` allow each row.
        budget_met: bool [B], False where protected tokens or the span cap forbade the budget.
        slot_counts: `kept_lengths` on the host.
        is_merged: whether any slot stands for more than one token.
        is_padded: whether any slot is padding.
        origin: what the prompt was made from, fingerprints of all tokens among it; None where its holder let go of it.
    """

    inputs_embeds: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    slot_lengths: Tensor
    span_ids: Tensor
    original_lengths: Tensor
    kept_lengths: Tensor
    budgets: Tensor
    budget_met: Tensor
    slot_counts: list[int]
    is_merged: bool
    is_padded: bool
    origin: PromptOrigin | None = None

    def __repr__(self) -> str:
        tokens, met = self.original_lengths.tolist(), self.budget_met.tolist()
        return f"{type(self).__name__}(tokens={tokens}, slots={self.slot_counts}, budget_met={met})"

    def to_html(self, tokenizer: Any, row: int | None = None) -> str:
        """A self-contained page that shows what one prompt was merged into: to be written to a file, or for
        `IPython.display.HTML`. The package draws it; a checkpoint's own code does not.

        Args:
            tokenizer: of the ids.
            row: of the batch; may be left out where there is one.

        Raises:
            ImportError: the package is not installed.
            ValueError: there is no such row, it has to be named, or the origin was let go.
        """
        if self.origin is None:
            raise ValueError("nothing says what this prompt was made from: `compress` does, the forward lets go of it")
        try:
            # By name: a plain import would be a need of every checkpoint's remote code.
            page = import_module("semtoken_hf.inspection.page")
        except ImportError as error:
            raise ImportError(
                "`to_html` needs the package, which a checkpoint does not carry: pip install semtoken-hf"
            ) from error
        return page.page_of_origin(self.origin, tokenizer, row)


def compress_prompt(
    config: Any,
    encoder: SemanticEncoder | None,
    embed_tokens: Callable[[Tensor], Tensor],
    input_ids: Tensor,
    position_ids: Tensor | None = None,
    position_offset: Tensor | None = None,
    position_mode: str | None = None,
    merger: LearnedMerger | None = None,
    **planning: Any,
) -> CompressedPrompt:
    """Plan, merge and lay out the slots of a batch of prompts.

    Args:
        config: a SemToken configuration.
        encoder: the frozen encoder, or None where planning needs none.
        embed_tokens: int64 [B, T] -> [B, T, H].
        input_ids: int64 [B, T].
        position_ids: int64 [B, T] or [1, T], positions of the tokens; None: their place among the row's tokens.
        position_offset: int64 [B], added to the positions that are counted here: what the cache already holds.
        position_mode: instead of the configuration's.
        merger: the learned residual, if the checkpoint has one.
        planning: `attention_mask`, `read_mask`, `protected_mask`, `span_ids`, `target_ratio`, `is_sequence_start`,
            `query_mask`, `query_weight` of `plan_spans`.

    Raises:
        ValueError: an argument has the wrong shape or values.
    """
    mode = config.position_mode if position_mode is None else position_mode
    if mode not in config.position_modes:
        raise ValueError(f"`position_mode` must be one of {list(config.position_modes)}, got {mode!r}")
    plan = plan_spans(config, encoder, input_ids, **planning)
    if position_ids is not None:
        _check_positions(position_ids, *input_ids.shape)
    stream, lay_out = input_ids.flatten()[plan.layout.token_index], _lay_out_slots(plan)
    slots, anchors = merge_spans(
        lambda index: embed_tokens(stream[index][None])[0],
        plan.spans,
        base_merge_mode(config),
        plan.fingerprints,
        merger,
        plan.most_merged,
    )
    positions = slot_positions(plan, anchors, mode, position_ids, position_offset)
    if is_merged := len(slots) < len(stream):
        _warn_of_merging(config, mode, plan.all_budgets_met)
    return CompressedPrompt(
        inputs_embeds=lay_out(slots),
        position_ids=lay_out(positions),
        attention_mask=lay_out(torch.ones_like(plan.spans.first)),
        slot_lengths=lay_out(plan.spans.lengths),
        span_ids=plan.span_ids,
        original_lengths=plan.original_lengths,
        kept_lengths=plan.kept_lengths,
        budgets=plan.budgets,
        budget_met=plan.budget_met,
        slot_counts=plan.slot_counts,
        is_merged=is_merged,
        is_padded=min(plan.slot_counts) < max(plan.slot_counts),
        # The caller may change its configuration before it asks.
        origin=PromptOrigin(plan, copy(config), input_ids, anchors, positions, planning),
    )


def slot_positions(
    plan: SpanPlan,
    anchors: Tensor,
    position_mode: str,
    position_ids: Tensor | None = None,
    position_offset: Tensor | None = None,
) -> Tensor:
    """Rotary position of each slot of a plan, int64 [P]; arguments as in `PromptOrigin` and `compress_prompt`."""
    layout, first = plan.layout, plan.spans.first
    if position_ids is not None and position_mode != "compact":
        return position_ids.expand(plan.span_ids.shape).flatten()[layout.token_index[anchors]]
    if position_mode == "compact":
        positions = plan.span_ids.flatten()[layout.token_index[first]]
    else:
        positions = layout.position[anchors]
    return positions if position_offset is None else positions + position_offset[layout.row[first]]


def _lay_out_slots(plan: SpanPlan) -> Callable[[Tensor], Tensor]:
    """What brings values of the slots, [P, ...], into left-padded rows, [B, M, ...]."""
    rows, width = len(plan.slot_counts), max(plan.slot_counts)
    if min(plan.slot_counts) == width:
        return lambda values: values.unflatten(0, (rows, width))
    row = plan.layout.row[plan.spans.first]
    rank = plan.span_ids.flatten()[plan.layout.token_index[plan.spans.first]]
    column = width - plan.kept_lengths[row] + rank

    def lay_out(values: Tensor) -> Tensor:
        return values.new_zeros((rows, width, *values.shape[1:])).index_put((row, column), values)

    return lay_out


def _check_positions(position_ids: Any, rows: int, columns: int) -> None:
    shape = tuple(position_ids.shape) if isinstance(position_ids, Tensor) else type(position_ids).__name__
    if shape not in ((rows, columns), (1, columns)):
        raise ValueError(f"`position_ids` must have the shape {(rows, columns)} or {(1, columns)}, got {shape}")


def _warn_of_merging(config: Any, position_mode: str, budgets_met: bool) -> None:
    """Warn of a budget that is not met, and of a position mode that an adapted checkpoint was not adapted for."""
    adapted = (config.adapted_for or {}).get("position_mode")
    if adapted is not None and adapted != position_mode:
        logger.warning_once(
            f"This checkpoint was adapted for position_mode='{adapted}' and is used with '{position_mode}': expect "
            "worse text. Use the mode it was adapted for, or adapt it again."
        )
    if not budgets_met:
        logger.warning_once(
            "SemToken kept more slots than the budget allows: protected tokens, `num_sink_tokens`/`recent_window`, "
            f"`min_prompt_length` ({config.min_prompt_length}) or `max_span_length` ({config.max_span_length}) "
            "forbid it. See `CompressedPrompt.budget_met`."
        )


def log_prefill(prompt: Any, cache: Any = None) -> None:
    """At level info: tokens, slots and bytes, and what the budget could not honour. Else nothing, without a wait.

    Args:
        prompt: the CompressedPrompt that was read.
        cache: that holds its slots by now; None: none, or pages that others own.
    """
    if not logger.isEnabledFor(logging.INFO):
        return
    tokens, slots = int(prompt.original_lengths.sum()), sum(prompt.slot_counts)
    held = f"; the KV cache takes {cache_bytes(cache):,} bytes" if hasattr(cache, "layers") else ""
    plain = f"; {fallbacks.total():,} calls before it ran plain, as their warnings say" if fallbacks else ""
    ratio = f"{tokens / max(slots, 1):.2f} per slot"
    logger.info(f"SemToken read {tokens:,} tokens in {slots:,} slots ({ratio}){held}{plain}.")
    for row, (kept, budget) in enumerate(zip(prompt.slot_counts, prompt.budgets.tolist(), strict=True)):
        if kept > budget:
            logger.info(
                f"Row {row} keeps {kept:,} slots of a budget of {budget:,}: its protected tokens and "
                "`max_span_length` forbid fewer."
            )


__all__ = ["CompressedPrompt", "PromptOrigin", "compress_prompt", "log_prefill", "slot_positions"]
