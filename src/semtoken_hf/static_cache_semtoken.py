"""KV cache of fixed size behind a prompt that was read into slots: what `cache_implementation="static"` decodes with.

- The prompt is read over a `SemTokenCache`; its slots then move into static layers that have room for the new tokens.
- Behind the prompt each token is one column, so that the mask and the positions of a step follow from what the prompt
  left and from one counter, a tensor: nothing in Python grows, and a compiled step is the plain model's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import StaticCache

from .cache_semtoken import SemTokenCache, cache_bytes


class SemTokenStaticCache(StaticCache):
    """A `StaticCache` whose first columns are the slots of a prompt.

    Args:
        config: of the model.
        prompt: the cache over which the prompt was read, in dynamic layers; they are emptied one by one on the way.
        max_cache_len: columns of each layer, at least the prompt's slots.

    Attributes:
        prompt_slots: int64 [B, P], tokens of each of the prompt's columns, 0 for padding.
        prompt_tokens: length of the prompt in the original sequence, padding included.
        max_columns: columns of each layer that has no window.
        is_compressed: whether these columns are other than those of the original sequence.
        compressed_rows: bool [B], rows with a merged slot.
    """

    def __init__(self, config: Any, prompt: SemTokenCache, max_cache_len: int):
        super().__init__(config=config, max_cache_len=max_cache_len)
        slots, rows = prompt.slot_lengths, prompt.compressed_rows
        assert slots is not None
        assert rows is not None
        self.prompt_slots, self.prompt_tokens, self.compressed_rows = slots, prompt.get_seq_length(), rows
        self.is_compressed, self.is_padded, self.max_columns = prompt.is_compressed, prompt.is_padded, max_cache_len
        self.prompt_span_ids = prompt.prompt_span_ids
        self.is_compact = config.position_mode == "compact"
        # Tokens behind the prompt: a tensor, which is no constant of a compiled step, where CUDA graphs expect it.
        self.appended = torch.zeros((), dtype=torch.long, device=slots.device)
        torch._dynamo.mark_static_address(self.appended)
        # int64 [B, 1], position of the first of them.
        self.start = (self.compressed_lengths if self.is_compact else self.original_lengths)[:, None]
        for layer, source in zip(self.layers, prompt.layers, strict=True):
            _fill(layer, source, slots.shape[1])

    @property
    def slot_lengths(self) -> Tensor:
        """int64 [B, columns so far], tokens of each column, 0 for the prompt's padding."""
        return pad(self.prompt_slots, (0, int(self.appended)), value=1)

    @property
    def original_lengths(self) -> Tensor:
        """int64 [B]: tokens that each row stands for, the prompt's padding left out."""
        return self.prompt_slots.sum(1) + self.appended

    @property
    def compressed_lengths(self) -> Tensor:
        """int64 [B]: columns that each row holds, the prompt's padding left out."""
        return (self.prompt_slots > 0).sum(1) + self.appended

    def check_room(self, tokens: int) -> None:
        """Raise ValueError unless the layers have room for `tokens` of the original sequence, padding included."""
        room = self.prompt_tokens + self.max_columns - self.prompt_slots.shape[1]
        if tokens > room:
            raise ValueError(
                f"this static cache has room for {room} tokens in all, and {tokens} may be needed: give a larger "
                "`max_cache_len` to the `generate` that makes it, or use the default cache, which grows"
            )

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Length of the original sequence, padding included: an int64 tensor [], as of static layers."""
        return self.prompt_tokens + self.appended

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Column of the next query, an int64 tensor []: physical, because masks are."""
        return self.prompt_slots.shape[1] + self.appended

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == len(self.layers) - 1:  # the layers before it read the same counter
            self.appended.add_(key_states.shape[-2])
        return states

    def mask_of_columns(self, attention_mask: Any, columns: int) -> Any:
        """The mask over columns: the prompt's own, then that of the caller; a prepared one is left as it is.

        Args:
            attention_mask: [B, T] over the original sequence up to the new tokens; None hides the prompt's padding.
            columns: number of new tokens.

        Returns:
            bool [B, P + T - prompt_tokens], or [B, max_cache_len] for None; None where no column is hidden.

        Raises:
            ValueError: the mask does not reach beyond the prompt, or that of several tokens hides one behind it.
        """
        if not self.is_compressed or getattr(attention_mask, "ndim", 2) != 2 or isinstance(attention_mask, dict):
            return attention_mask
        held = self.prompt_slots > 0
        if attention_mask is None:
            return pad(held, (0, self.max_columns - held.shape[1]), value=True) if self.is_padded else None
        if attention_mask.shape[1] <= self.prompt_tokens:
            raise ValueError(
                f"`attention_mask` must cover the {self.prompt_tokens} tokens of the prompt and those behind it, got "
                f"the shape {tuple(attention_mask.shape)}"
            )
        behind = attention_mask[:, self.prompt_tokens :].to(held.device) != 0
        if columns > 1 and not bool(behind.all()):
            raise ValueError("a static cache cannot hide tokens behind its prompt: continue with the default cache")
        return torch.cat([held, behind], dim=1)

    def positions_of(self, position_ids: Tensor | None, columns: int) -> Tensor | None:
        """int64 [B, columns], positions of the next columns; `position_ids` where these are right already."""
        if not self.is_compressed or (position_ids is not None and not self.is_compact):
            return position_ids
        return self.start + self.appended + torch.arange(columns, device=self.start.device)

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        rows = beam_idx.to(self.prompt_slots.device)
        self.prompt_slots, self.start = self.prompt_slots[rows], self.start[rows]
        self.compressed_rows = self.compressed_rows[rows]

    def reset(self) -> None:
        """Forget the prompt, too: from here on it is a plain static cache."""
        super().reset()
        self.prompt_slots, self.prompt_tokens, self.is_compressed = self.prompt_slots[:, :0], 0, False
        self.appended.zero_()

    def memory_bytes(self) -> int:
        """Bytes of the keys and values, room to grow into included."""
        return cache_bytes(self)


def _fill(layer: Any, source: Any, length: int) -> None:
    """Move what a dynamic layer holds of `length` columns into an empty static one; a window keeps the last of them."""
    layer.lazy_initialization(source.keys, source.values)
    size = layer.max_cache_len
    held = min(source.keys.shape[2], size)
    start = 0 if length < size else size - held
    layer.keys[:, :, start : start + held] = source.keys[:, :, -held:]
    layer.values[:, :, start : start + held] = source.values[:, :, -held:]
    source.keys = source.values = None
    layer.cumulative_length.add_(length)
    if layer.is_sliding:
        layer.cumulative_length_int = length


__all__ = ["SemTokenStaticCache"]
