"""What attention backends need to know when rotary positions have gaps."""

from __future__ import annotations

from typing import Any

import torch


def flash_attention_kwargs(
    attn_implementation: str | None, batch_size: int, query_length: int, key_length: int, device: torch.device
) -> dict[str, Any]:
    """Variable-length arguments that keep FlashAttention from reading gapped positions as packed sequences.

    Transformers infers packing from `position_ids` when the batch is 1 and no mask is left; explicit cumulative
    lengths take priority. Empty for other backends: SDPA and eager would ignore them.

    Returns:
        `cu_seq_lens_q`, `cu_seq_lens_k` (int32 [2]), `max_length_q`, `max_length_k` (int), or nothing.
    """
    if batch_size != 1 or not (attn_implementation or "").startswith(("flash_attention", "kernels-community/")):
        return {}
    return {
        "cu_seq_lens_q": torch.tensor([0, query_length], dtype=torch.int32, device=device),
        "cu_seq_lens_k": torch.tensor([0, key_length], dtype=torch.int32, device=device),
        "max_length_q": query_length,
        "max_length_k": key_length,
    }


__all__ = ["flash_attention_kwargs"]
