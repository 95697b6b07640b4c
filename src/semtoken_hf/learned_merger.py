"""The learned part of a merged slot: a residual on its base that starts at zero.

A span is read in four equal parts, in order, and through the encoder's eyes:

    u = (mean of the 1st, .., 4th quarter of its embeddings),    f = mean of its fingerprints
    slot = base + scale * (W_out gelu(W_u rmsnorm(u) + W_f rmsnorm(f)) + v[length])

so the residual knows what stood where, what it meant there and how much there was. `scale` is the size of the span's
embeddings. `W_out` and `v` start at zero: an unadapted merger is exactly its base.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

PARTS = 4
# Tokens that are read of a span, evenly spaced: all of up to so many, and some of them more than once.
READ_TOKENS = 32
# Longest lengths that share a vector; longer spans share the last one.
LENGTHS = (2, 4, 8, 16, 32)
EPSILON = 1e-6


class LearnedMerger(nn.Module):
    """Residual of merged slots: about `(PARTS + 1) * merger_rank * hidden_size` multiplications for each of them."""

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


__all__ = ["LearnedMerger", "read_places"]
