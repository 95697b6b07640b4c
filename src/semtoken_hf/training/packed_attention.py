"""Attention of a packed row without the blocks that nobody sees.

A packed row is [M slots ; raw tokens of chunk 1, 2, ..]. Slots are causal among themselves. The raw tokens of a chunk
see the slots of earlier chunks and, causally, each other. Most of the square is empty, so every chunk is a call of its
own, on the keys that it sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "semtoken_packed"


@dataclass(frozen=True)
class ChunkView:
    """What one chunk sees.

    Attributes:
        start: column of its first raw token in the packed row.
        slots: columns of slots that any row of the batch sees.
        mask: bool [B, 1, c, slots + c].
    """

    start: int
    slots: int
    mask: Tensor


def chunk_views(counts: Tensor, chunk_length: int) -> list[ChunkView]:
    """Views of chunks 1, 2, .. of rows whose earlier chunks have `counts` int64 [B, C - 1] slots."""
    seen = counts.cumsum(1)
    width, causal = int(seen[:, -1].max()), torch.ones(chunk_length, chunk_length, dtype=torch.bool).tril()
    causal = causal.to(counts.device).expand(len(counts), -1, -1)
    views = []
    for chunk, most in enumerate(seen.max(0).values.tolist()):
        slots = torch.arange(most, device=counts.device) < seen[:, chunk, None]
        mask = torch.cat([slots[:, None].expand(-1, chunk_length, -1), causal], dim=2)
        views.append(ChunkView(width + chunk * chunk_length, most, mask[:, None]))
    return views


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_views: list[ChunkView] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """PyTorch's attention, part by part where `packed_views` says that the row is packed; shapes as in Transformers."""
    if packed_views is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    end = packed_views[0].start
    # Slots first; what pads them follows the last, where none of them looks.
    slots = (query[:, :, :end], key[:, :, :end], value[:, :, :end])
    parts = [sdpa_attention_forward(module, *slots, attention_mask=None, **kwargs)[0]]
    for view in packed_views:
        raw = slice(view.start, view.start + view.mask.shape[2])
        keys, values = (torch.cat([x[:, :, : view.slots], x[:, :, raw]], dim=2) for x in (key, value))
        parts.append(sdpa_attention_forward(module, query[:, :, raw], keys, values, view.mask, **kwargs)[0])
    return torch.cat(parts, dim=1), None


def use_packed_attention(model: Any) -> None:
    """Let `model` read packed rows; everything else goes on with PyTorch's attention."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.config._attn_implementation = NAME
