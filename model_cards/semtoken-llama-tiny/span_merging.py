"""Slots from spans: one embedding and one anchor token (whose position the slot carries) per span.

- `mean`: the average of the span's embeddings, at the position of its last token.
- `representative`: the embedding of the token whose fingerprint is nearest the span's mean, at its own position.
- `learned` adds a residual to either (`learned_merger.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .span_clustering import Spans

# Cosines closer than this are equal: rounding must not decide.
TIE = 1e-5


def last_tokens(spans: Spans) -> Tensor:
    """Stream index of the last token of each span, int64 [P]."""
    return spans.first + spans.lengths - 1


def representative_tokens(fingerprints: Tensor | None, spans: Spans) -> Tensor:
    """Stream index of the token nearest its span's mean fingerprint, int64 [P]; the last one without fingerprints.

    Ties go to the later token; two tokens are always equally near their mean.
    """
    if fingerprints is None:
        return last_tokens(spans)
    nearness = (fingerprints * spans.mean(fingerprints)[spans.index]).sum(-1)
    best = torch.segment_reduce(nearness, "max", lengths=spans.lengths, unsafe=True)
    place = torch.arange(len(nearness), device=nearness.device)
    candidates = place.where(nearness >= best[spans.index] - TIE, -1)
    return torch.full_like(spans.first, -1).scatter_reduce_(0, spans.index, candidates, "amax")


def merge_spans(
    embeddings: Tensor,
    spans: Spans,
    base: str,
    fingerprints: Tensor | None = None,
    add_residual: Callable[[Tensor, Spans, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Slot embeddings and anchors.

    Args:
        embeddings: [N, H] token embeddings of the stream; gradients flow back to them.
        spans: its P spans.
        base: "mean" or "representative".
        fingerprints: float32 [N, D], for the representative.
        add_residual: a `LearnedMerger`; None: the slots are their bases.

    Returns:
        slots [P, H] in the dtype of `embeddings`, and anchors int64 [P], the token whose position each slot carries.
    """
    if base == "representative":
        anchors = representative_tokens(fingerprints, spans)
        slots = embeddings[anchors]
    else:
        slots, anchors = spans.mean(embeddings), last_tokens(spans)
    if add_residual is not None:
        # The merger may live on another device than the embeddings.
        slots = add_residual(embeddings, spans, slots).to(embeddings.device)
    return slots, anchors


__all__ = ["merge_spans"]
