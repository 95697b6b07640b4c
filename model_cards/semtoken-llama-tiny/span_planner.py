"""Stages 1 to 3 as one call: token ids and masks -> a span plan. What the model and the tokenizer share.

- The plan knows nothing of embeddings, so a data loader can make it on the CPU from the encoder alone.
- How many slots there will be is learned before the encoder runs, in the one wait of the host for the device: a budget
  says how many slots each segment keeps whatever the fingerprints are. Only thresholds without a budget have to wait a
  second time, for the spans they found.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .configuration_semtoken import base_merge_mode, check_query_weight, check_ratio
from .granularity import CompressionBudget, Text, find_span_starts, segment_budgets, slots_of_segments
from .question_finding import find_question
from .semantic_encoder import SemanticEncoder
from .span_clustering import Spans
from .token_layout import TokenLayout, build_layout, on_device


@dataclass
class SpanPlan:
    """Which tokens share a slot.

    Attributes:
        layout: the packed stream of N tokens.
        spans: its P slots.
        fingerprints: float32 [N, D], or None where no encoder ran.
        span_ids: int64 [B, T], slot of every token counted from 0 in its row; -1 for padding.
        original_lengths: int64 [B], tokens of each row without padding.
        kept_lengths: int64 [B], slots of each row.
        budgets: int64 [B], slots that the ratio and `max_slots` allow; all tokens where there is no budget.
        budget_met: bool [B], False where protected tokens or the span cap left more slots than that.
        slot_counts: `kept_lengths` on the host.
        all_budgets_met: `budget_met` of all rows, on the host.
        most_merged: at least as many as the slots of several tokens, on the host.
    """

    layout: TokenLayout
    spans: Spans
    fingerprints: Tensor | None
    span_ids: Tensor
    original_lengths: Tensor
    kept_lengths: Tensor
    budgets: Tensor
    budget_met: Tensor
    slot_counts: list[int]
    all_budgets_met: bool
    most_merged: int


def needs_encoder(config: Any) -> bool:
    """Whether planning reads fingerprints; the uniform segmentation does not."""
    return config.segmentation_mode != "uniform"


def granularity_of(config: Any, target_ratio: float | None, query_weight: float | None = None) -> CompressionBudget:
    """The configuration's granularity, with the ratio and the weight of this call if they are given.

    Raises:
        ValueError: `target_ratio` is not a finite number >= 1, or `query_weight` is out of its range.
    """
    if target_ratio is not None:
        check_ratio(target_ratio)
    if query_weight is not None:
        check_query_weight(query_weight)
    return CompressionBudget(
        target_ratio=config.target_ratio if target_ratio is None else target_ratio,
        max_slots=config.max_slots,
        similarity_threshold=config.similarity_threshold,
        entropy_threshold=config.entropy_threshold,
        max_span_length=config.max_span_length,
        min_prompt_length=config.min_prompt_length,
        segmentation_mode=config.segmentation_mode,
        query_weight=config.query_weight if query_weight is None else query_weight,
    )


def always_protected(config: Any) -> list[int]:
    """Ids that never merge: BOS, EOS, padding and `protected_token_ids`."""
    ids = set(config.protected_token_ids or [])
    for value in (config.bos_token_id, config.eos_token_id, config.pad_token_id):
        ids.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    return sorted(ids)


def check_ids(input_ids: Tensor) -> None:
    """Raise ValueError unless `input_ids` are int [B, T] with rows."""
    is_ids = isinstance(input_ids, Tensor) and input_ids.dtype in (torch.int64, torch.int32)
    if not is_ids or input_ids.ndim != 2 or not len(input_ids):
        found = f"{input_ids.dtype} {tuple(input_ids.shape)}" if isinstance(input_ids, Tensor) else type(input_ids)
        raise ValueError(f"`input_ids` must be an int64 or int32 tensor [batch, tokens] of at least 1 row, got {found}")


def check_mask(mask: Tensor, input_ids: Tensor, name: str) -> Tensor:
    """`mask` as bool on the device of `input_ids`.

    Raises:
        ValueError: its shape is not that of `input_ids`, or it holds fractions.
    """
    if not isinstance(mask, Tensor) or mask.shape != input_ids.shape:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"`{name}` must be a tensor of shape {tuple(input_ids.shape)} like input_ids, got {shape}")
    if mask.is_floating_point() and bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(f"`{name}` must hold 0 and 1, got other numbers")
    return mask.to(input_ids.device) != 0


def plan_spans(
    config: Any,
    encoder: SemanticEncoder | None,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    read_mask: Tensor | None = None,
    protected_mask: Tensor | None = None,
    span_ids: Tensor | None = None,
    target_ratio: float | None = None,
    is_sequence_start: bool = True,
    query_mask: Tensor | None = None,
    query_weight: float | None = None,
) -> SpanPlan:
    """Plan the slots of a batch of prompts.

    Args:
        config: a SemToken configuration.
        encoder: the frozen encoder; None where `needs_encoder(config)` is False, or `span_ids` is given for means. A
            learned merger reads its fingerprints whatever made the plan.
        input_ids: int64 [B, T].
        attention_mask: [B, T], 0 for padding on any side; None: no padding.
        read_mask: bool [B, T], positions whose logits are asked for; None: the last token of each row.
        protected_mask: [B, T], non-zero for tokens that must stay whole.
        span_ids: int [B, T], a ready plan (slot of every token, -1 for padding), used instead of planning; tokens
            that are read or protected are still taken out of their spans.
        target_ratio: tokens per slot, instead of the configuration's.
        is_sequence_start: False for a later turn, where `num_sink_tokens` has had its effect.
        query_mask: [B, T], non-zero for the tokens of the question, which stay whole; None: what `find_question`
            finds in a chat.
        query_weight: how much the question decides, instead of the configuration's.

    Raises:
        ValueError: ids, a mask or `span_ids` have the wrong shape or values, or the ratio is below 1.
    """
    check_ids(input_ids)
    valid = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask is not None:
        valid = check_mask(attention_mask, input_ids, "attention_mask")
    if query_mask is not None:
        query_mask = check_mask(query_mask, input_ids, "query_mask")
    granularity = granularity_of(config, target_ratio, query_weight)
    layout = _lay_out(config, input_ids, valid, read_mask, protected_mask, query_mask, is_sequence_start)
    # A ready plan says which tokens merge, but not which of them represents the others.
    needed = needs_encoder(config) if span_ids is None else base_merge_mode(config) == "representative"
    if not needed and config.merge_mode != "learned":
        encoder = None
    elif needed and encoder is None:
        raise ValueError("planning needs the encoder: pass it, or use segmentation_mode='uniform'")
    starts, is_valid = _starts_without_encoder(layout, granularity, span_ids, valid)
    windows = layout.lengths.new_zeros(()) if encoder is None else encoder.count_windows(layout)
    # Asked with the counts, where the host waits anyway: a GPU that looks such an id up is lost for the process.
    is_known = (((input_ids >= 0) & (input_ids < config.vocab_size)) | ~valid).all()
    counts = count_slots(layout, granularity, len(input_ids), windows, starts, is_valid, is_known)
    if not counts.ids_known:
        raise ValueError(
            f"`input_ids` must be in [0, {config.vocab_size}), the vocabulary, got {int(input_ids.min())} to "
            f"{int(input_ids.max())}: the tokenizer may belong to another model, or have added tokens. Then call "
            "`model.resize_token_embeddings(len(tokenizer))`; a planner from `SpanPlanner.from_model(model)` follows"
        )
    if not counts.is_valid:
        raise ValueError("`span_ids` must be -1 exactly at padding and count 0, 1, 2, ... without gaps along each row")
    layout = layout.trim(counts.tokens, counts.segments)
    fingerprints = None
    ids = input_ids.flatten()[layout.token_index]
    if encoder is not None:
        fingerprints = encoder(ids, layout, windows=counts.windows).to(input_ids.device)
    if starts is None:
        text = read_text(config, ids, query_mask, layout) if granularity.segmentation_mode == "sentence" else None
        starts = find_span_starts(fingerprints, layout, granularity, text, counts.most_spans)
    return _finish_plan(starts[: counts.tokens], fingerprints, layout, granularity, valid, counts)


def _lay_out(
    config: Any,
    input_ids: Tensor,
    valid: Tensor,
    read_mask: Tensor | None,
    protected_mask: Tensor | None,
    query_mask: Tensor | None,
    is_sequence_start: bool,
) -> TokenLayout:
    read = last_valid_token(valid) if read_mask is None else check_mask(read_mask, input_ids, "read_mask") & valid
    protected = torch.isin(input_ids, on_device(always_protected(config), input_ids.device))
    if protected_mask is not None:
        protected = protected | check_mask(protected_mask, input_ids, "protected_mask")
    if query_mask is not None:
        protected = protected | query_mask
    num_sink_tokens = config.num_sink_tokens if is_sequence_start else 0
    return build_layout(valid, read, protected, num_sink_tokens, config.recent_window, config.min_prompt_length)


def read_text(config: Any, ids: Tensor, query_mask: Tensor | None, layout: TokenLayout) -> Text:
    """What the sentence mode reads of a trimmed stream of the ids [N]; `query_mask` bool [B, T] or None."""
    markers = config.text_markers or {}
    opening, query = markers.get("turn_opening") or [], None
    ends_sentence = is_marker(config, ids, "sentence_ends")
    if query_mask is not None:
        query = query_mask.flatten()[layout.token_index]
    elif opening:
        breaks, ending = is_marker(config, ids, "line_breaks"), markers.get("turn_ending") or []
        query = find_question(ids, breaks, ends_sentence, opening, ending, layout)
    return Text(ids, ends_sentence, query)


def is_marker(config: Any, ids: Tensor, name: str) -> Tensor:
    """Which of the ids [N] `config.text_markers` lists under `name`: bool [N]."""
    return torch.isin(ids, on_device((config.text_markers or {}).get(name) or [], ids.device))


def _starts_without_encoder(
    layout: TokenLayout, granularity: CompressionBudget, span_ids: Tensor | None, valid: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Where slots begin, bool [N], if no fingerprint is needed to say it, and for a ready plan whether it is one."""
    if span_ids is not None:
        return starts_from_span_ids(span_ids, valid, layout)
    is_uniform = granularity.segmentation_mode == "uniform"
    return find_span_starts(None, layout, granularity) if is_uniform else None, None


def last_valid_token(valid: Tensor) -> Tensor:
    """bool [B, T]: True at the last True of each row of `valid`."""
    order = valid.long().cumsum(1)
    return valid & (order == order[:, -1:])


def starts_from_span_ids(span_ids: Tensor, valid: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
    """Span starts bool [N] of a plan that came from outside, and a bool scalar.

    It is False where the plan is not -1 exactly at padding, or does not count 0, 1, 2, ... along each row.

    Raises:
        ValueError: it is not an integer tensor of the shape of the batch.
    """
    if not isinstance(span_ids, Tensor) or span_ids.shape != valid.shape:
        shape = tuple(span_ids.shape) if isinstance(span_ids, Tensor) else type(span_ids).__name__
        raise ValueError(f"`span_ids` must be an integer tensor of shape {tuple(valid.shape)}, got {shape}")
    if span_ids.is_floating_point() or span_ids.is_complex() or span_ids.dtype == torch.bool:
        raise ValueError(f"`span_ids` must hold integers, got {span_ids.dtype}")
    span_ids = span_ids.to(valid.device).long()
    stream = span_ids.flatten()[layout.token_index]
    is_sequence_start = layout.position == 0
    step = torch.ones_like(stream)
    step[1:] = stream[1:] - stream[:-1]
    in_order = torch.where(is_sequence_start, stream == 0, (step == 0) | (step == 1)) | ~layout.is_token
    is_valid = ((span_ids == -1) == ~valid).all() & in_order.all()
    return is_sequence_start | (step == 1) | ~layout.mergeable, is_valid


def _finish_plan(
    starts: Tensor,
    fingerprints: Tensor | None,
    layout: TokenLayout,
    granularity: CompressionBudget,
    valid: Tensor,
    counts: SlotCounts,
) -> SpanPlan:
    original = valid.long().sum(1)
    kept = kept_per_row(starts, layout.row, len(valid))
    if counts.rows is None:
        # Thresholds alone: nobody knew before.
        counts = replace(counts, rows=kept.tolist())
    assert counts.rows is not None
    spans = Spans.from_starts(starts, sum(counts.rows))
    before = kept.cumsum(0) - kept
    budgets = budget_per_row(layout, granularity, len(valid))
    span_ids = torch.full((valid.numel(),), -1, dtype=torch.long, device=valid.device)
    span_ids[layout.token_index] = spans.index - before[layout.row]
    return SpanPlan(
        layout=layout,
        spans=spans,
        fingerprints=fingerprints,
        span_ids=span_ids.view(valid.shape),
        original_lengths=original,
        kept_lengths=kept,
        budgets=budgets,
        budget_met=kept <= budgets,
        slot_counts=counts.rows,
        all_budgets_met=counts.budgets_met,
        most_merged=counts.most_merged,
    )


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


__all__ = [
    "SlotCounts",
    "SpanPlan",
    "count_slots",
    "is_marker",
    "kept_per_row",
    "last_valid_token",
    "needs_encoder",
    "plan_spans",
    "read_text",
]
