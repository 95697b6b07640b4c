"""Attention over slots: the backend `semtoken_varlen`, and what FlashAttention needs to know of gapped positions.

`attn_implementation="semtoken_varlen"` reads rows of different lengths that lie one behind the other (see
`ragged_cache_semtoken.py`), each row its own slots alone. Wherever a call has no such rows it is `sdpa`, bit for bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

from .logging_semtoken import get_logger
from .ragged_cache_semtoken import RaggedStep

logger = get_logger(__name__)

VARLEN = "semtoken_varlen"


def varlen_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    ragged_attention: Callable[..., Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`sdpa`, or over ragged rows the `attend_ragged` that the model brings.

    One process may hold this module twice, of two revisions: both register this name, and the last one serves both.
    """
    if ragged_attention is None:
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if kwargs.get("output_attentions"):
        logger.warning_once(f"`{VARLEN}` returns no attention weights; use the `eager` attention for them.")
    return ragged_attention(query, key, value, scaling=scaling), None


def attend_ragged(query: Tensor, key: Tensor, value: Tensor, step: RaggedStep, scaling: float | None = None) -> Tensor:
    """Attention of every row over its own slots, causal from their end.

    Args:
        query: [1, H, N, D], the new slots of all rows one behind the other.
        key, value: [C, H_kv, D], the storage of a ragged layer.
        step: which of them belong to which row.

    Returns:
        [1, N, H, D].
    """
    packed, groups = query[0].transpose(0, 1), query.shape[1] // key.shape[1]
    attend = _kernel_for(packed)
    if max(step.queries) > 1:
        return attend(packed, key, value, step, 1, scaling)[None]
    # One query a row: the heads that share keys become queries, which see all of their row. FlashAttention does so by
    # itself, but counts on one query for every row and gap.
    packed = packed.unflatten(1, (-1, groups)).transpose(1, 2).flatten(0, 1)
    out = attend(packed, key, value, step, groups, scaling)
    return out.unflatten(0, (-1, groups)).transpose(1, 2).flatten(1, 2)[None]


def varlen_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask of `sdpa`; a ragged cache needs none, and asks for none."""
    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)


def _kernel_for(query: Tensor) -> Callable[..., Tensor]:
    """(query [N, H, D], keys [C, H_kv, D], values, step, queries per slot, scaling) -> [N, H, D].

    Causal, unless no row has more than one new slot: its queries, then, are heads, and see all of their row.
    """
    if _is_fit_for_flash(query):
        if is_flash_attn_2_available():
            return _flash_attention
        if _torch_varlen() is not None:
            return _torch_attention
    return _row_by_row


def _is_fit_for_flash(query: Tensor) -> bool:
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    is_new_enough = torch.version.cuda is None or torch.cuda.get_device_capability(query.device) >= (8, 0)
    return is_new_enough and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256


@cache
def _torch_varlen() -> Callable[..., Tensor] | None:
    """FlashAttention's kernel inside PyTorch, where it has what is needed; its arguments differ between versions."""
    try:
        function = import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError:
        return None
    needed = {"scale", "window_size", "enable_gqa"}
    return function if needed <= inspect.signature(function).parameters.keys() else None


def _flash_attention(
    query: Tensor, keys: Tensor, values: Tensor, step: RaggedStep, copies: int, scaling: Any
) -> Tensor:
    attend, lengths = import_module("flash_attn").flash_attn_varlen_func, step.cumulative(query.device, copies)
    return attend(query, keys, values, *lengths, softmax_scale=scaling, causal=max(step.queries) > 1)


def _torch_attention(
    query: Tensor, keys: Tensor, values: Tensor, step: RaggedStep, copies: int, scaling: Any
) -> Tensor:
    attend: Any = _torch_varlen()
    shares_keys, window = query.shape[1] != keys.shape[1], (-1, 0 if max(step.queries) > 1 else -1)
    lengths = step.cumulative(query.device, copies)
    return attend(query, keys, values, *lengths, scale=scaling, window_size=window, enable_gqa=shares_keys)


def _row_by_row(query: Tensor, keys: Tensor, values: Tensor, step: RaggedStep, copies: int, scaling: Any) -> Tensor:
    out, end, is_causal, shares_keys = [], 0, max(step.queries) > 1, query.shape[1] != keys.shape[1]
    for new, start, length in zip(step.queries, step.starts, step.lengths, strict=True):
        if not new:
            continue
        part, held = slice(end, end + new * copies), slice(start, start + length)
        end = part.stop
        q, k, v = (t[span].transpose(0, 1)[None] for t, span in ((query, part), (keys, held), (values, held)))
        has_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
        if is_causal and 1 < new < length and q.device.type == "cpu" and not has_gradient:
            states = _behind_a_past(q, k, v, length - new, scaling)
        else:
            mask = None
            if is_causal and 1 < new < length:
                mask = torch.ones(new, length, dtype=torch.bool, device=q.device).tril(length - new)
            states = scaled_dot_product_attention(
                q, k, v, mask, is_causal=is_causal and new == length, scale=scaling, enable_gqa=shares_keys
            )
        out.append(states[0].transpose(0, 1))
    return torch.cat(out)


def _behind_a_past(query: Tensor, keys: Tensor, values: Tensor, past: int, scaling: float | None) -> Tensor:
    """Causal attention [1, H, Q, D] behind `past` keys that all queries see, without a mask of the size Q x keys.

    The two parts are joined by their log-sum-exp, as FlashAttention joins its blocks (arXiv 2307.08691, section 3.1),
    through which no gradient flows.
    """
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    before, log_before = attend(query, keys[:, :, :past], values[:, :, :past], scale=scaling)
    own, log_own = attend(query, keys[:, :, past:], values[:, :, past:], is_causal=True, scale=scaling)
    share = torch.sigmoid(log_before - log_own).unsqueeze(-1)
    return torch.lerp(own.to(share.dtype), before.to(share.dtype), share).to(query.dtype)


AttentionInterface.register(VARLEN, varlen_attention_forward)
AttentionMaskInterface.register(VARLEN, varlen_mask)


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

    def cumulative(length: int) -> Tensor:
        # Made on the device: a copy of a list would wait for it, in every step.
        return torch.arange(2, dtype=torch.int32, device=device) * length

    return {
        "cu_seq_lens_q": cumulative(query_length),
        "cu_seq_lens_k": cumulative(key_length),
        "max_length_q": query_length,
        "max_length_k": key_length,
    }


__all__ = ["VARLEN", "attend_ragged", "flash_attention_kwargs"]
