"""Why a plan is as it is, token by token, for people who look at it.

A prompt may come from the code that a checkpoint carries: its classes are then other ones of the same names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..compression import PromptOrigin
from ..configuration_semtoken import base_merge_mode
from ..granularity import candidate_starts, span_entropy
from ..sentence_selection import find_sentences, first_tokens
from ..span_clustering import Spans, row_products
from ..span_planner import always_protected, granularity_of, is_marker, last_valid_token
from ..token_layout import on_device

# Why a token shares a slot or not; `SpanDetails.reason` holds places in here.
REASONS = {
    "padding": "padding",
    "merged": "merged",
    "budget": "kept fine: its candidate span is worth it",
    "alone": "kept: no similar neighbour may join it",
    "read": "read: its logits are asked for",
    "special": "protected: special token",
    "question": "protected: the question",
    "marked": "protected: marked by the caller",
    "scored": "protected: scored behind a token that is read",
    "short": "protected: the prompt is too short",
    "first": "protected: among the first",
    "last": "protected: among the last",
}
CODES = {name: code for code, name in enumerate(REASONS)}


@dataclass(repr=False, eq=False)
class SpanDetails:
    """What a reader of a plan wants to know of B rows of T tokens.

    A candidate span is what the greedy mode may merge before the budget keeps some fine: single tokens have no
    entropy, the candidate's is what explains the decision. In other modes the slots are the candidates.

    Attributes:
        input_ids: int64 [B, T].
        span_ids: int64 [B, T], slot of every token, -1 for padding.
        candidate_ids: int64 [B, T], candidate span of every token, counted over all rows, -1 for padding.
        entropy: float32 [B, T], of the token's candidate span; NaN for padding and where no encoder ran.
        similarity: float32 [B, T], cosine with the first token of its candidate span, the paper's criterion, 1 for
            that token itself; NaN as above.
        reason: int8 [B, T], places in `REASONS`.
        position: int64 [B, T], rotary position of the token's slot, -1 for padding.
        is_carrier: bool [B, T], the token that its slot has its position from, and in merge mode "representative" its
            embedding.
        budget: int64 [B], slots that the row may keep: all of its tokens where there is no budget.
        target_ratio: tokens per slot that were asked for, or None.
        merge_mode: "mean" or "representative".
    """

    input_ids: Tensor
    span_ids: Tensor
    candidate_ids: Tensor
    entropy: Tensor
    similarity: Tensor
    reason: Tensor
    position: Tensor
    is_carrier: Tensor
    budget: Tensor
    target_ratio: float | None
    merge_mode: str

    @property
    def protected_mask(self) -> Tensor:
        """bool [B, T], tokens that never merge; those that are read are not among them."""
        return self.reason >= CODES["special"]

    @property
    def read_mask(self) -> Tensor:
        """bool [B, T], tokens whose logits somebody reads."""
        return self.reason == CODES["read"]


def describe(origin: PromptOrigin) -> SpanDetails:
    """Why the plan of a prompt is as it is, in O(N) time and memory; `origin` is that of a `CompressedPrompt`."""
    plan, config, input_ids = origin.plan, origin.config, origin.input_ids
    candidates, place = _candidate_spans(origin), torch.arange(len(plan.layout.row), device=input_ids.device)
    entropy, similarity = _entropy_and_similarity(plan.fingerprints, candidates, place)

    def lay_out(values: Tensor, fill: Any) -> Tensor:
        batch = values.new_full((input_ids.numel(),), fill)
        batch[plan.layout.token_index] = values
        return batch.view(input_ids.shape)

    return SpanDetails(
        input_ids=input_ids,
        span_ids=plan.span_ids,
        candidate_ids=lay_out(candidates.index, -1),
        entropy=lay_out(entropy, torch.nan),
        similarity=lay_out(similarity, torch.nan),
        reason=lay_out(_reasons(origin, candidates), CODES["padding"]),
        position=lay_out(origin.positions[plan.spans.index], -1),
        is_carrier=lay_out(place == origin.anchors[plan.spans.index], False),
        budget=plan.budgets,
        target_ratio=granularity_of(config, origin.planning.get("target_ratio")).target_ratio,
        merge_mode=base_merge_mode(config),
    )


def _candidate_spans(origin: PromptOrigin) -> Spans:
    plan, config, layout = origin.plan, origin.config, origin.plan.layout
    granularity = granularity_of(config, origin.planning.get("target_ratio"))
    if plan.fingerprints is None or origin.planning.get("span_ids") is not None:
        return plan.spans
    if granularity.segmentation_mode == "greedy":
        # The budget splits candidates: there are no more of them than slots.
        return Spans.from_starts(candidate_starts(plan.fingerprints, layout, granularity), len(plan.spans))
    if granularity.segmentation_mode == "sentence":
        ends = is_marker(config, origin.input_ids.flatten()[layout.token_index], "sentence_ends")
        return Spans.from_starts(first_tokens(find_sentences(ends, layout)), len(layout.row))
    return plan.spans


def _reasons(origin: PromptOrigin, candidates: Spans) -> Tensor:
    """Of every token of the stream: int8 [N], places in `REASONS`."""
    plan, config, given, layout = origin.plan, origin.config, origin.planning, origin.plan.layout
    device, read_mask = origin.input_ids.device, given.get("read_mask")
    masks = {
        "read": last_valid_token(plan.span_ids >= 0) if read_mask is None else read_mask,
        "special": torch.isin(origin.input_ids, on_device(always_protected(config), device)),
        "question": given.get("query_mask"),
        "marked": given.get("protected_mask"),
    }
    known = {n: m.to(device).flatten()[layout.token_index] != 0 for n, m in masks.items() if m is not None}
    known["scored"] = known["read"].roll(1) & (layout.position > 0)
    known["short"] = layout.lengths[layout.segment] < config.min_prompt_length
    known["first"] = (layout.position < config.num_sink_tokens) & given.get("is_sequence_start", True)
    known["last"] = layout.to_end < config.recent_window
    reason = torch.zeros_like(layout.row, dtype=torch.int8)
    # The reason is the first that applies.
    for name in reversed(known):
        reason.masked_fill_(known[name], CODES[name])
    reason.masked_fill_(~layout.unmergeable, CODES["merged"])
    is_single = ~layout.unmergeable & (plan.spans.lengths == 1)[plan.spans.index]
    reason.masked_fill_(is_single, CODES["budget"])
    return reason.masked_fill_(is_single & (candidates.lengths == 1)[candidates.index], CODES["alone"])


def _entropy_and_similarity(fingerprints: Tensor | None, spans: Spans, place: Tensor) -> tuple[Tensor, Tensor]:
    """Of every token's span, and of every token with the first of its span: float32 [N] each."""
    if fingerprints is None:
        unknown = torch.full_like(place, torch.nan, dtype=torch.float32)
        return unknown, unknown
    first = spans.first[spans.index]
    similarity = row_products(fingerprints, fingerprints, first).masked_fill(place == first, 1.0)
    return span_entropy(fingerprints, spans)[spans.index], similarity


__all__ = ["REASONS", "SpanDetails", "describe"]
