"""Which kernel attention will run on this machine: for a prefill, for a step of decoding, for rows of other lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from ...varlen_semtoken import VARLEN, _is_fit_for_flash, _kernel_for, _torch_varlen
from .checks import Check

GROUP = "Attention"
# Slots of the prompt that is asked about: the choice does not depend on it.
SLOTS = 256
KERNELS = {
    SDPBackend.FLASH_ATTENTION.value: "PyTorch's FlashAttention",
    SDPBackend.EFFICIENT_ATTENTION.value: "PyTorch's memory-efficient kernel",
    SDPBackend.CUDNN_ATTENTION.value: "cuDNN",
    SDPBackend.MATH.value: "plain matrix products",
    SDPBackend.OVERRIDEABLE.value: "the device's own kernel",
}
RAGGED_KERNELS = {
    "_flash_attention": "flash-attn's variable-length kernel",
    "_torch_attention": "PyTorch's varlen_attn",
    "_row_by_row": "SDPA, row by row",
}


@dataclass(frozen=True)
class Shape:
    """Of the attention that is asked about; those of Llama-3.2-1B where there is no checkpoint."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64
    dtype: torch.dtype = torch.bfloat16


def shape_of(config: Any) -> Shape:
    """Of a checkpoint's configuration."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return Shape(heads, kv_heads, head_dim, config.dtype or torch.float32)


def check_attention(shape: Shape, device: torch.device | None = None) -> list[Check]:
    """What runs under the default attention `sdpa`, and under `semtoken_varlen`."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = str(shape.dtype).removeprefix("torch.")
    where = f"{device.type}, {dtype}, {shape.heads} heads of {shape.head_dim}"
    prefill, masked = _sdpa_kernel(shape, SLOTS, False, device), _sdpa_kernel(shape, SLOTS, True, device)
    return [
        Check(GROUP, "prefill, a row", "ok", f"sdpa: {prefill}", f"causal, no mask; {where}"),
        Check(GROUP, "decode, a row", "ok", f"sdpa: {_sdpa_kernel(shape, 1, False, device)}", "one query, no mask"),
        Check(GROUP, "padded batch", "ok", f"sdpa: {masked}", "rows differ in slots: padded to the longest, masked"),
        _check_ragged(shape, device),
    ]


def _sdpa_kernel(shape: Shape, queries: int, has_mask: bool, device: torch.device) -> str:
    """What `scaled_dot_product_attention` chooses by itself."""
    choose = getattr(torch, "_fused_sdp_choice", None)
    if choose is None:
        return "PyTorch's choice"
    query = torch.empty(1, shape.heads, queries, shape.head_dim, dtype=shape.dtype, device=device)
    # As Transformers repeats the keys of heads that share them, unless the kernel does.
    keys = torch.empty(1, shape.heads, SLOTS, shape.head_dim, dtype=shape.dtype, device=device)
    mask = torch.ones(1, 1, queries, SLOTS, dtype=torch.bool, device=device) if has_mask else None
    chosen = choose(query, keys, keys, mask, 0.0, queries > 1 and not has_mask)
    return KERNELS.get(int(chosen), f"kernel {int(chosen)}")


def _check_ragged(shape: Shape, device: torch.device) -> Check:
    query = torch.empty(1, shape.heads, shape.head_dim, dtype=shape.dtype, device=device)
    kernel = RAGGED_KERNELS.get(_kernel_for(query).__name__, _kernel_for(query).__name__)
    return Check(GROUP, "ragged batch", "ok", f"{VARLEN}: {kernel}", _why(query))


def _why(query: torch.Tensor) -> str:
    """Why that kernel: the first thing that rules out a faster one."""
    if not query.is_cuda:
        return "no padding is read; variable-length kernels need a GPU"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"variable-length kernels need float16 or bfloat16, not {str(query.dtype).removeprefix('torch.')}"
    if not _is_fit_for_flash(query):
        return "variable-length kernels need compute capability 8.0 and heads of a multiple of 8, at most 256"
    if _kernel_for(query).__name__ == "_row_by_row":
        return "pip install flash-attn" + ("" if _torch_varlen() else ", or a newer PyTorch, for one kernel call")
    return "one call for all rows, no padding is read"


__all__ = ["Shape", "check_attention", "shape_of"]
