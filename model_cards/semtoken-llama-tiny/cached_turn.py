"""A new turn behind a cache: its columns, its part of the mask, its record, what it hides of earlier turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cache_semtoken import is_semtoken_cache


@dataclass
class Turn:
    """What one forward hands the family's layers.

    Attributes:
        name: "input_ids" or "inputs_embeds".
        columns: [B, Q] or [B, Q, H], recorded in the cache.
        position_ids: int64 [B, Q] or [1, Q], or None.
        cache: behind which they stand, or None.
        attention_mask: over all columns so far, or None; ragged rows need none.
        adapted: bool [B] or [B, Q], where an adapter acts; None or False: nowhere.
        has_gaps: whether the positions so far are gapped.
        counts: of ragged rows, columns of each row that are no padding; None: rows are padded.
        index: int64 [N], those columns in the flattened [B * Q]; None where no column is padding.
    """

    name: str
    columns: Tensor
    position_ids: Tensor | None
    cache: Any
    attention_mask: Tensor | None = None
    adapted: Tensor | bool | None = None
    has_gaps: bool = False
    counts: list[int] | None = None
    index: Tensor | None = None


def check_chunk_size(value: Any) -> None:
    """Raise ValueError unless `prefill_chunk_size` is None or a number of columns."""
    if value is not None and (type(value) is not int or not 1 <= value < 2**63):
        raise ValueError(f"`prefill_chunk_size` must be an integer >= 1 (and < 2**63) or None, got {value!r}")


def mask_of_turn(mask: Tensor | None, input_ids: Tensor, cache: Any) -> Tensor | None:
    """The part of a mask over all tokens so far that belongs to `input_ids`.

    Raises:
        ValueError: the mask covers neither these tokens nor all tokens so far.
    """
    if mask is None:
        return None
    tokens, held = input_ids.shape[1], 0 if cache is None else cache.get_seq_length()
    if mask.shape[1] not in (tokens, held + tokens):
        expected = (len(input_ids), held + tokens)
        raise ValueError(f"`attention_mask` must have the shape {expected}, got {tuple(mask.shape)}")
    return mask[:, -tokens:]


def apply_past_mask(mask: Tensor | None, columns: Tensor | None, cache: Any) -> None:
    """Drop from a cache what the mask of a new turn hides of earlier ones; ignored when decoding."""
    if mask is None or columns is None or not is_semtoken_cache(cache):
        return
    if getattr(mask, "ndim", 0) != 2 or columns.shape[1] == 1:
        return
    held = cache.get_seq_length()
    if held and mask.shape[1] == held + columns.shape[1]:
        cache.drop_masked(mask[:, :held])


def begin_behind_prefix(input_ids: Tensor, cache: Any) -> None:
    """Make a cache that begins with a prefix fit whole sequences int64 [B, n], or refuse them.

    Where a text meets the prefix, its tokenizer may have joined the last tokens of the prefix with the first of what
    follows: the cache is cropped to what they share. It is, too, if nothing follows, so that there is a token to read.

    Raises:
        ValueError: they part from the prefix in or before merged slots.
    """
    prefix, held = cache.prefix_ids, cache.get_seq_length()
    if prefix is None:
        return
    width = min(prefix.shape[1], input_ids.shape[1] - 1)
    same = (input_ids[:, :width] == prefix[:, :width].to(input_ids.device)).all(0)
    shared = int(same.long().cumprod(0).sum())
    if shared == prefix.shape[1]:
        return
    try:
        cache.crop(shared - held)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"`input_ids` share {shared} tokens with the prefix of {prefix.shape[1]} in the cache: `generate` takes "
            "the whole sequence, the prefix's ids first. Write `model.generate(**prefix.inputs(question, tokenizer))`, "
            "or begin the text, or the chat, with exactly what was compressed"
        ) from error


def counts_of_turn(cache: Any, tokens: Tensor, is_masked: bool) -> tuple[list[int], Tensor | None]:
    """Columns of each row that are no padding, and where they lie; waits for the device if a turn has a mask."""
    rows, width = tokens.shape
    if not is_masked or width == 1:
        return [width] * rows, None
    real = cache.slot_lengths[:, -width:] > 0
    return real.sum(1).tolist(), real.flatten().nonzero().squeeze(1)


def append_plain(
    cache: Any, tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, position_mode: str
) -> tuple[Tensor | None, Tensor | None]:
    """Record tokens that are appended one slot each; returns the mask and positions that the layers need.

    As long as the cache holds nothing merged, both are what the caller gave, so that the family's own path is exact.

    Raises:
        ValueError: a prepared mask, over the original sequence, and a cache with merged slots.
    """
    is_prepared = attention_mask is not None and getattr(attention_mask, "ndim", 0) != 2
    if is_prepared and cache.is_compressed:
        raise ValueError(
            "a prepared attention mask does not fit a cache with merged slots; pass a 2D mask over all tokens"
        )
    new = None if attention_mask is None or is_prepared else attention_mask[:, -tokens.shape[1] :]
    if tokens.shape[1] == 1 and getattr(cache, "ragged_rows", None) is not None:
        # The host has to know how long rows are: what a mask hides of single steps goes with the next turn.
        new = None
    slots = torch.ones(tokens.shape, dtype=torch.long, device=tokens.device) if new is None else (new != 0).long()
    if cache.is_compressed and (position_mode == "compact" or position_ids is None):
        held = cache.compressed_lengths if position_mode == "compact" else cache.original_lengths
        position_ids = (held[:, None] + slots.cumsum(1) - 1).clamp(min=0)
    elif position_ids is None:
        # The family would count them from the cache, which knows of these tokens before its layers do.
        position_ids = torch.arange(tokens.shape[1], device=tokens.device)[None] + cache.get_seq_length()
    cache.record(slots, tokens.shape[1], compressed=False, padded=new is not None)
    return (cache.attention_mask if cache.is_compressed else attention_mask), position_ids


__all__ = [
    "Turn",
    "append_plain",
    "apply_past_mask",
    "begin_behind_prefix",
    "check_chunk_size",
    "counts_of_turn",
    "mask_of_turn",
]
