"""Slots from spans: one embedding and one anchor token (whose position the slot carries) per span.

- `mean`: the average of the span's embeddings, at the position of its last token.
- `representative`: the embedding of the token whose fingerprint is nearest the span's mean, at its own position.
- `learned` adds a residual to either (`LearnedMerger`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .span_clustering import Spans, row_products
from .token_layout import indices_where

# Cosines closer than this are equal: rounding must not decide.
TIE = 1e-5
# Merged slots at a time that get their residual: bounds the tokens' embeddings that are held for it.
SLOTS_PER_CALL = 1024
# Of a span that are averaged apart, in order.
PARTS = 4
# Tokens that are read of a span, evenly spaced: all of up to so many, and some of them more than once.
READ_TOKENS = 32
# Longest lengths that share a vector; longer spans share the last one.
LENGTHS = (2, 4, 8, 16, 32)
EPSILON = 1e-6


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
        most_merged: at least as many as the spans of several tokens, so that the host need not wait for the device to
            count them; None: it counts.

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


def is_on_host(tensor: Tensor) -> bool:
    """Whether looking at its values makes nobody wait."""
    return tensor.device.type == "cpu"


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
    # Few slots are merged where sentences stay whole: on a CPU counting them saves nearly all of the residuals.
    count = int(is_merged.sum()) if most_merged is None or is_on_host(is_merged) else most_merged
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


class LearnedMerger(nn.Module):
    """The learned part of a merged slot: a residual on its base that starts at zero.

    A span is read in four equal parts, in order, and through the encoder's eyes:

        u = (mean of the 1st, .., 4th quarter of its embeddings),    f = mean of its fingerprints
        slot = base + scale * (W_out gelu(W_u rmsnorm(u) + W_f rmsnorm(f)) + v[length])

    so the residual knows what stood where, what it meant there and how much there was. `scale` is the size of the
    span's embeddings. `W_out` and `v` start at zero: an unadapted merger is exactly its base. Each slot takes about
    `(PARTS + 1) * merger_rank * hidden_size` multiplications.
    """

    def __init__(self, config: Any):
        super().__init__()
        width, rank, encoder_width = config.hidden_size, config.merger_rank, config.encoder_config.hidden_size
        self.in_proj = nn.Parameter(torch.empty(rank, PARTS * width))
        self.state_proj = nn.Parameter(torch.empty(rank, encoder_width))
        self.out_proj = nn.Parameter(torch.empty(width, rank))
        self.length_vectors = nn.Parameter(torch.empty(len(LENGTHS), width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random projections in, zero out."""
        for projection in (self.in_proj, self.state_proj):
            init.normal_(projection, mean=0.0, std=(2 * projection.shape[1]) ** -0.5)
        init.zeros_(self.out_proj)
        init.zeros_(self.length_vectors)

    def forward(self, tokens: Tensor, states: Tensor, lengths: Tensor) -> Tensor:
        """Residuals of K merged slots.

        Args:
            tokens: [K, READ_TOKENS, H], embeddings of the tokens at `read_places(lengths)` of each span.
            states: [K, D], mean fingerprint of each span.
            lengths: int64 [K], tokens of each span.

        Returns:
            [K, H] in the dtype of `tokens`.
        """
        dtype = tokens.dtype
        parts = tokens.unflatten(1, (PARTS, -1)).mean(2).flatten(1)
        scale = tokens.float().square().mean((1, 2)).add(EPSILON**2).sqrt().to(dtype)[:, None]
        hidden = nn.functional.linear(_unit_rms(parts), self.in_proj.to(dtype))
        hidden = hidden + nn.functional.linear(_unit_rms(states).to(dtype), self.state_proj.to(dtype))
        residual = nn.functional.linear(nn.functional.gelu(hidden), self.out_proj.to(dtype))
        return scale * (residual + self.length_vectors[_length_bucket(lengths)]).to(dtype)


def read_places(lengths: Tensor) -> Tensor:
    """int64 [K, READ_TOKENS]: places, in ascending order, at which spans of `lengths` (int64 [K]) are read."""
    return torch.arange(READ_TOKENS, device=lengths.device) * lengths[:, None] // READ_TOKENS


def _length_bucket(lengths: Tensor) -> Tensor:
    """int64 [K]: the first of LENGTHS that is no shorter, or the last."""
    return sum((lengths > longest).long() for longest in LENGTHS[:-1])  # type: ignore[return-value]


def _unit_rms(values: Tensor) -> Tensor:
    """`values` [K, N] over the root of their mean square; zeros stay zeros."""
    wide = values.float()
    return (wide * wide.square().mean(-1, keepdim=True).add(EPSILON**2).rsqrt()).to(values.dtype)


__all__ = ["LearnedMerger", "merge_spans", "read_places"]
