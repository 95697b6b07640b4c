"""Slots from spans: one embedding and one anchor token (whose position the slot carries) per span.

- `mean`: the average of the span's embeddings, at the position of its last token.
- `representative`: the embedding of the token whose fingerprint is nearest the span's mean, at its own position.
- `learned` adds a residual to either (`learned_merger.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .learned_merger import LearnedMerger, read_places
from .span_clustering import Spans, row_products
from .token_layout import indices_where

# Cosines closer than this are equal: rounding must not decide.
TIE = 1e-5
# Merged slots at a time that get their residual: bounds the tokens' embeddings that are held for it.
SLOTS_PER_CALL = 1024


def last_tokens(spans: Spans) -> Tensor:
    """Stream index of the last token of each span, int64 [P]."""
    return spans.first + spans.lengths - 1


def representative_tokens(fingerprints: Tensor | None, spans: Spans) -> Tensor:
    """Stream index of the token nearest its span's mean fingerprint, int64 [P]; the last one without fingerprints.

    Ties go to the later token; two tokens are always equally near their mean.
    """
    if fingerprints is None:
        return last_tokens(spans)
    nearness = row_products(fingerprints, spans.mean(fingerprints), spans.index)
    best = torch.segment_reduce(nearness, "max", lengths=spans.lengths, unsafe=True)
    place = torch.arange(len(nearness), device=nearness.device)
    candidates = place.where(nearness >= best[spans.index] - TIE, -1)
    return torch.full_like(spans.first, -1).scatter_reduce_(0, spans.index, candidates, "amax")


def merge_spans(
    embed: Callable[[Tensor], Tensor],
    spans: Spans,
    base: str,
    fingerprints: Tensor | None = None,
    merger: LearnedMerger | None = None,
    most_merged: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Slot embeddings and anchors.

    Args:
        embed: indices of tokens of the stream, int64 [n] -> their embeddings [n, H]; gradients flow back to them.
        spans: its P spans.
        base: "mean" or "representative".
        fingerprints: float32 [N, D], for the representative and the merger, which needs them.
        merger: the learned residual; None: the slots are their bases.
        most_merged: at least as many as the spans of several tokens; None: the host waits to learn it.

    Returns:
        slots [P, H] in the dtype of the embeddings, and anchors int64 [P], the token whose position each slot carries.
    """
    if base == "representative":
        anchors = representative_tokens(fingerprints, spans)
        slots = embed(anchors)
    else:
        anchors = last_tokens(spans)
        slots = spans.mean(embed(torch.arange(len(spans.index), device=spans.index.device)))
    if merger is not None:
        slots = _with_residual(slots, embed, spans, fingerprints, merger, most_merged)
    return slots, anchors


def _with_residual(
    slots: Tensor,
    embed: Callable[[Tensor], Tensor],
    spans: Spans,
    fingerprints: Tensor | None,
    merger: LearnedMerger,
    most_merged: int | None,
) -> Tensor:
    """`slots` [P, H] with the residual of those that stand for several tokens."""
    is_merged = spans.lengths > 1
    count = int(is_merged.sum()) if most_merged is None else most_merged
    if not count:
        return slots
    if fingerprints is None:
        raise ValueError("the learned merger reads fingerprints: pass the encoder")
    index = indices_where(is_merged, count)
    # Beyond the last merged span: any will do, it is given nothing.
    is_real, index = index < len(spans), index.clamp(max=len(spans) - 1)
    states, residuals = spans.mean(fingerprints), []
    for some in index.split(SLOTS_PER_CALL):
        lengths = spans.lengths[some]
        tokens = spans.first[some, None] + read_places(lengths)
        residuals.append(merger(embed(tokens.flatten()).unflatten(0, tokens.shape), states[some], lengths))
    # The merger may live on another device than the embeddings.
    residual = torch.cat(residuals).to(slots)
    return slots.index_add(0, index, residual.where(is_real[:, None], 0))


__all__ = ["merge_spans"]
