"""KV cache that holds fewer positions than the tokens it stands for (law 8).

- Layers hold physical columns; `get_seq_length()` is the original length, which `generate` counts in.
- One tensor of bookkeeping, `slot_lengths`: how many tokens each physical column stands for in each row (0 = padding).
  Original and compressed lengths, the physical attention mask and what may be cropped all follow from it.
- Under the attention `semtoken_varlen` layers hold each row's slots alone (`varlen_semtoken.py`); the bookkeeping
  stays in columns.
- A `Turn` is what one forward reads behind a cache: its columns, its part of the mask, what it hides of earlier turns.
- It imports nothing of the package, so that the file alone can be loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# Of a quantised layer, beside its most recent keys and values.
QUANTIZED = ("_quantized_keys", "_quantized_values")


class SemTokenCache(DynamicCache):
    """A `DynamicCache` whose columns may each stand for several tokens of the original sequence."""

    def __init__(self, config: Any = None, **kwargs: Any):
        super().__init__(config=config, **kwargs)
        self.clear_record()

    @classmethod
    def from_cache(cls, cache: Any) -> SemTokenCache:
        """An empty cache with the layers of an empty `cache`: dynamic, offloaded, quantised."""
        new = cls()
        vars(new).update(vars(cache))
        return new

    def clear_record(self) -> None:
        self.slot_lengths: Tensor | None = None
        self.seen_tokens = 0
        self.is_compressed = False
        self.is_padded = False
        # Latest columns that are one token each, and those without padding.
        self.plain_tail = self.whole_tail = 0
        # Where each row lies in layers that hold no padding.
        self.ragged_rows: Any = None
        # Set by `generate`, for `recompress_every`, and for its output.
        self.generated: Any = None
        self.prompt_span_ids: Tensor | None = None
        # Tokens read plain in the latest calls of several tokens each.
        self.plain_pieces = 0
        # int64 [1, T]: what a `CompressedPrefix` put in front.
        self.prefix_ids: Tensor | None = None

    def record(self, slot_lengths: Tensor, tokens: int, compressed: bool, padded: bool) -> None:
        """Note what the next `update` of the layers appends.

        Args:
            slot_lengths: int64 [B, Q], tokens of each new column, 0 for padding.
            tokens: columns of the original sequence that they stand for (padding included).
            compressed: whether the new columns are other than those of the original sequence.
            padded: whether any new column is padding.
        """
        known = self.slot_lengths
        self.slot_lengths = slot_lengths if known is None else torch.cat([known, slot_lengths], dim=1)
        self.seen_tokens += tokens
        self.is_compressed |= compressed
        self.is_padded |= padded
        self.plain_tail = 0 if compressed else self.plain_tail + tokens
        self.plain_pieces = 0 if compressed or tokens == 1 else self.plain_pieces + tokens
        self.whole_tail = 0 if padded else self.whole_tail + slot_lengths.shape[1]

    def drop_masked(self, attention_mask: Tensor) -> None:
        """Take tokens out of the record that were read and that a later mask hides: what fills up a finished row.

        Args:
            attention_mask: [B, P] over the tokens so far; only what was appended since the last merged slots is heeded.
        """
        if not self.plain_tail or self.slot_lengths is None:
            return
        tail = self.slot_lengths[:, -self.plain_tail :]
        hidden = (attention_mask[:, -self.plain_tail :] == 0) & (tail > 0)
        if bool(hidden.any()):
            held = self.slot_lengths > 0
            self.slot_lengths = torch.cat(
                [self.slot_lengths[:, : -self.plain_tail], tail.masked_fill(hidden, 0)], dim=1
            )
            self.is_padded, self.whole_tail = True, 0
            if self.ragged_rows is not None:
                self.ragged_rows.keep(self.layers, held, self.slot_lengths > 0)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer: Any = self.layers[layer_idx]
        if getattr(layer, "record_past", False):
            # Before 5.23, a window that records its past hands out all of it, and the mask knows of the window alone.
            visible = layer.sliding_window - 1 + key_states.shape[-2]
            keys, values = keys[:, :, -visible:], values[:, :, -visible:]
        return keys, values

    @property
    def original_lengths(self) -> Tensor | None:
        """int64 [B]: tokens that each row stands for, padding left out; None while empty."""
        return None if self.slot_lengths is None else self.slot_lengths.sum(1)

    @property
    def compressed_lengths(self) -> Tensor | None:
        """int64 [B]: slots that each row holds, padding left out; None while empty."""
        return None if self.slot_lengths is None else (self.slot_lengths > 0).sum(1)

    @property
    def compressed_rows(self) -> Tensor | None:
        """bool [B]: rows with a merged slot; None while empty."""
        return None if self.slot_lengths is None else (self.slot_lengths > 1).any(1)

    @property
    def attention_mask(self) -> Tensor | None:
        """int64 [B, P] over physical columns; None where no column is padding."""
        return (self.slot_lengths > 0).long() if self.is_padded and self.slot_lengths is not None else None

    def physical_length(self, layer_idx: int = 0) -> int:
        """Columns held by a layer."""
        return super().get_seq_length(layer_idx)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Length of the original sequence, padding included: what `generate` slices its inputs by."""
        return self.seen_tokens

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Column of the next query: physical, because masks are; ragged layers have none."""
        return self.physical_length(layer_idx) if self.ragged_rows is None else 0

    def memory_bytes(self) -> int:
        """Bytes of the keys and values, room to grow into included."""
        return cache_bytes(self)

    def reset(self) -> None:
        super().reset()
        if self.ragged_rows is not None:
            self.layers = [DynamicLayer() for _ in self.layers]
            self.layer_class_to_replicate = self.layer_class_to_replicate and DynamicLayer
        layer: Any
        for layer in self.layers:  # before 5.23, they keep columns of zeros
            layer.keys = layer.values = None
            layer.is_initialized = False
        self.clear_record()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; as in Transformers, a negative number, and (before 5.23) a positive one is a length.

        Raises:
            ValueError: one of these tokens lies in a merged slot, which cannot be cut in two.
        """
        # Before 5.23, assisted decoding passes a tensor, which would make a tensor of the length.
        tokens_to_remove = int(tokens_to_remove)
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(self.seen_tokens - tokens_to_remove, 0)
        self.plain_pieces = 0  # they were drafts
        if self.slot_lengths is None:
            return
        if count == 0:  # layers with a sliding window let go of what they recorded
            return super().crop(0)
        is_plain = count <= self.plain_tail  # known without waiting for the device
        if count > self.slot_lengths.shape[1] or (not is_plain and bool((self.slot_lengths[:, -count:] > 1).any())):
            raise ValueError(
                f"cannot crop {count} tokens: they reach into merged slots. Crop less, or start again from the prompt "
                "with an empty SemTokenCache"
            )
        if self.ragged_rows is None:
            super().crop(-count)
        else:
            is_whole = count <= self.whole_tail
            self.ragged_rows.crop(
                [count] * len(self.slot_lengths) if is_whole else (self.slot_lengths[:, -count:] > 0).sum(1).tolist()
            )
        self.slot_lengths = self.slot_lengths[:, :-count]
        self.seen_tokens -= count
        self.prefix_ids = None if self.prefix_ids is None else self.prefix_ids[:, : self.seen_tokens]
        self.plain_tail, self.whole_tail = max(self.plain_tail - count, 0), max(self.whole_tail - count, 0)

    def reorder_cache(self, beam_idx: Any) -> None:
        if self.ragged_rows is None:
            super().reorder_cache(beam_idx)
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.ragged_rows is None:
            super().batch_repeat_interleave(repeats)
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.ragged_rows is None:
            super().batch_select_indices(indices)
        self._map_rows(lambda rows: rows[indices.to(rows.device)])

    def _map_rows(self, function: Any) -> None:
        """Map the record's rows, and those of ragged layers, whose lengths the host has to know: beams wait for it."""
        if self.slot_lengths is None:
            return
        if self.ragged_rows is not None:
            rows = function(torch.arange(len(self.slot_lengths)))
            self.ragged_rows.take_rows(self.layers, rows.tolist())
        self.slot_lengths = function(self.slot_lengths)


def is_semtoken_cache(cache: Any) -> bool:
    """Whether `cache` is a SemTokenCache; by its interface, since remote code may define the class a second time."""
    return hasattr(cache, "record") and hasattr(cache, "slot_lengths")


def is_static_cache(cache: Any) -> bool:
    """Whether `cache` is a SemTokenStaticCache; by its interface, since remote code may define it a second time."""
    return hasattr(cache, "mask_of_columns")


def is_prefix(value: Any) -> bool:
    """Whether `value` is a CompressedPrefix; by its interface, since remote code may define the class a second time."""
    return hasattr(value, "inputs") and hasattr(value, "cache")


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values of any cache with layers, quantised or not."""
    names = ("keys", "values", *QUANTIZED)
    return sum(_nbytes(getattr(layer, name, None)) for layer in cache.layers for name in names)


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        if is_traceable_wrapper_subclass(value):
            return sum(_nbytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return 0
    return sum(_nbytes(item) for item in value)


def is_quantized(cache: Any) -> bool:
    """Whether any layer keeps its states in a quantised form, or will."""
    # Before 5.21, an empty layer does not have `QUANTIZED` yet.
    return any(hasattr(layer, "_dequantize") for layer in cache.layers)


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
    "SemTokenCache",
    "Turn",
    "append_plain",
    "apply_past_mask",
    "begin_behind_prefix",
    "cache_bytes",
    "check_chunk_size",
    "counts_of_turn",
    "is_prefix",
    "is_quantized",
    "is_semtoken_cache",
    "is_static_cache",
    "mask_of_turn",
]
