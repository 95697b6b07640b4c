"""The learned part of a merged slot: a residual on its base that starts at zero.

For a span of n tokens with embeddings e_0 .. e_{n-1}:

    slot = base + s * W_out silu(b[n] + sum_p g[n, p] * (W_in e_p / rms(e_p))),   s = mean of rms(e_p)

so the residual knows each token's place and the span's length, and does not depend on the scale of the embeddings.
`W_out` starts at zero: an unadapted merger is exactly its base.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .span_clustering import Spans

EPSILON = 1e-6


class LearnedMerger(nn.Module):
    """Residual of merged slots; costs `merger_rank * hidden_size` multiplications a token and as many a slot."""

    def __init__(self, config: Any):
        super().__init__()
        width, rank, longest = config.hidden_size, config.merger_rank, config.merger_span_length
        self.span_length = longest
        self.in_proj = nn.Parameter(torch.empty(rank, width))
        self.place_gate = nn.Parameter(torch.empty(longest, longest, rank))
        self.length_bias = nn.Parameter(torch.empty(longest, rank))
        self.out_proj = nn.Parameter(torch.empty(width, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random projections in, zero out."""
        init.normal_(self.in_proj, mean=0.0, std=self.in_proj.shape[1] ** -0.5)
        init.ones_(self.place_gate)
        init.zeros_(self.length_bias)
        init.zeros_(self.out_proj)

    def forward(self, embeddings: Tensor, spans: Spans, slots: Tensor) -> Tensor:
        """Slots with their residual.

        Args:
            embeddings: [N, H] of the stream.
            spans: its P spans; longer ones than `merger_span_length` count as that long.
            slots: [P, H], the bases.

        Returns:
            [P, H]: `slots`, changed where a span has more than one token.
        """
        merged = (spans.lengths > 1).nonzero().squeeze(1)
        if not len(merged):
            return slots
        lengths = spans.lengths[merged]
        index = torch.repeat_interleave(torch.arange(len(merged), device=lengths.device), lengths)
        offset = torch.arange(len(index), device=index.device) - (lengths.cumsum(0) - lengths)[index]
        row, place = lengths.clamp(max=self.span_length) - 1, offset.clamp(max=self.span_length - 1)

        tokens = embeddings[spans.first[merged][index] + offset].float()
        rms = tokens.square().mean(-1, keepdim=True).add(EPSILON**2).sqrt()
        hidden = nn.functional.linear(tokens / rms, self.in_proj.float()) * self.place_gate[row[index], place].float()
        hidden = torch.segment_reduce(hidden.float(), "sum", lengths=lengths, axis=0, unsafe=True)
        scale = torch.segment_reduce(rms, "mean", lengths=lengths, axis=0, unsafe=True)
        hidden = nn.functional.silu(hidden + self.length_bias[row].float())
        residual = scale * nn.functional.linear(hidden, self.out_proj.float())
        return slots.index_add(0, merged, residual.to(slots.dtype))


__all__ = ["LearnedMerger"]
