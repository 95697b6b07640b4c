"""The learned part of a merged slot: a residual on its base that starts at zero.

For a span of n tokens with embeddings e_0 .. e_{n-1}, K mixtures of them are read by a small network:

    u_k  = sum_p a[n, k, p] e_p,    u = (u_1, .., u_K)
    slot = base + rms(u) W_out silu(W_in u / rms(u) + b[n])

so the residual knows each token's place and the span's length, and scales with the embeddings. `W_out` starts at zero:
an unadapted merger is exactly its base.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

# Mixtures of a span's tokens: scalars a[n, k, p], since a vector for each token would cost more than the network.
MIXTURES = 4
EPSILON = 1e-6


class LearnedMerger(nn.Module):
    """Residual of merged slots: about `(MIXTURES + 1) * merger_rank * hidden_size` multiplications for each of them."""

    def __init__(self, config: Any):
        super().__init__()
        width, rank, longest = config.hidden_size, config.merger_rank, config.merger_span_length
        self.place_mix = nn.Parameter(torch.empty(longest, MIXTURES, longest))
        self.length_bias = nn.Parameter(torch.empty(longest, rank))
        self.in_proj = nn.Parameter(torch.empty(rank, MIXTURES * width))
        self.out_proj = nn.Parameter(torch.empty(width, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random mixtures and projection in, zero out."""
        init.normal_(self.place_mix, mean=0.0, std=1.0)
        init.normal_(self.in_proj, mean=0.0, std=self.in_proj.shape[1] ** -0.5)
        init.zeros_(self.length_bias)
        init.zeros_(self.out_proj)

    @property
    def longest(self) -> int:
        """Tokens of a span that are read."""
        return len(self.place_mix)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Residuals of K merged slots.

        Args:
            tokens: [K, longest, H], embeddings of each span's tokens; whatever follows them is ignored.
            lengths: int64 [K], how many there are, at most `longest`.

        Returns:
            [K, H] in the dtype of `tokens`.
        """
        row, place = lengths - 1, torch.arange(self.longest, device=lengths.device)
        mix = self.place_mix[row] * (place < lengths[:, None])[:, None]
        mixtures = torch.bmm(mix.to(tokens.dtype), tokens).flatten(1)
        scale = mixtures.float().square().mean(-1, keepdim=True).add(EPSILON**2).sqrt().to(tokens.dtype)
        hidden = nn.functional.linear(mixtures / scale, self.in_proj.to(tokens.dtype))
        hidden = nn.functional.silu(hidden + self.length_bias[row].to(tokens.dtype))
        return scale * nn.functional.linear(hidden, self.out_proj.to(tokens.dtype))


__all__ = ["LearnedMerger"]
