"""KV storage whose rows lie one behind the other, each with its own length: no slot of padding is held or read.

- Every layer holds [C, H_kv, D]: row b owns `capacities[b]` places from `starts[b]` on, of which `lengths[b]` are
  filled. These numbers live on the host, shared by all layers: nothing here waits for the device, unless it says so.
- A row has a little room to grow into; when one is full, all layers are laid out anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from .token_layout import on_device


class RaggedStep:
    """What one forward appends and reads.

    Attributes:
        queries: new slots of each row.
        starts, lengths: where each row begins in the storage, and its slots with the new ones.
    """

    def __init__(self, queries: list[int], starts: list[int], lengths: list[int]):
        self.queries, self.starts, self.lengths = queries, starts, lengths
        # Made once for all layers of a device.
        self._made: dict[Any, Any] = {}

    def places(self, device: torch.device) -> Tensor:
        """int64 [N]: where the new slots go."""
        if device not in self._made:
            ends = map(int.__add__, self.starts, self.lengths)
            self._made[device] = ranges(map(int.__sub__, ends, self.queries), self.queries, device)
        return self._made[device]

    def cumulative(self, device: torch.device, copies: int) -> tuple[Tensor, Tensor, int, int]:
        """Arguments of variable-length kernels: `cu_seqlens` int32 [2B] of queries and keys, their longest parts.

        The room behind each row is a sequence of its own, without queries. `copies`: queries of each new slot.
        """
        if (device, copies) not in self._made:
            seen = list(accumulate((q * copies for q in self.queries), initial=0))
            queries = [seen[0], *(n for n in seen[1:-1] for _ in range(2)), seen[-1]]
            keys = [n for start, length in zip(self.starts, self.lengths, strict=True) for n in (start, start + length)]
            longest = (max(b - a for a, b in pairwise(n)) for n in (queries, keys))
            both = on_device([queries, keys], device, torch.int32)
            self._made[device, copies] = (*both.unbind(), *longest)
        return self._made[device, copies]


class RaggedRows:
    """Where the rows of a batch lie in the storage of every layer."""

    def __init__(self, batch_size: int):
        self.lengths, self.capacities = [0] * batch_size, [0] * batch_size
        self.step: Any = None

    @property
    def size(self) -> int:
        return sum(self.capacities)

    @property
    def starts(self) -> list[int]:
        return list(accumulate(self.capacities, initial=0))[:-1]

    def reserve(self, layers: Iterable[Any], counts: list[int]) -> None:
        """Make room for `counts` more slots of each row."""
        needed = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        if any(n > capacity for n, capacity in zip(needed, self.capacities, strict=True)):
            self._lay_out(layers, self.lengths, partial(ranges, self.starts, self.lengths), needed)

    def advance(self, queries: list[int]) -> RaggedStep:
        """Let every layer's next `update` append so many slots to each row."""
        self.lengths = [length + count for length, count in zip(self.lengths, queries, strict=True)]
        self.step = RaggedStep(queries, self.starts, self.lengths)
        return self.step

    def crop(self, counts: list[int]) -> None:
        """Forget the last `counts` slots of each row."""
        self.lengths = [length - count for length, count in zip(self.lengths, counts, strict=True)]

    def take_rows(self, layers: Iterable[Any], rows: list[int]) -> None:
        """Go on with these rows, as often as they are named."""
        if rows == list(range(len(self.lengths))):
            return
        starts, lengths = ([numbers[row] for row in rows] for numbers in (self.starts, self.lengths))
        self._lay_out(layers, lengths, partial(ranges, starts, lengths), lengths)

    def keep(self, layers: Iterable[Any], held: Tensor, kept: Tensor) -> None:
        """Drop slots: of the columns that are `held`, bool [B, P], only those `kept` stay. Waits for the device."""
        starts = on_device(self.starts, held.device)
        source, lengths = (starts[:, None] + held.cumsum(1) - 1)[kept], kept.sum(1).tolist()
        self._lay_out(layers, lengths, source.to, lengths)

    def _lay_out(self, layers: Iterable[Any], lengths: list[int], source: Any, needed: list[int]) -> None:
        """Lay every layer out anew, from its old places `source(device)`, with room for more than `needed` slots."""
        self.lengths, self.capacities = lengths, [n + 16 + n // 32 for n in needed]
        made: dict[torch.device, Tensor] = {}
        for layer in layers:
            if layer.is_initialized:
                device = layer.keys.device
                if device not in made:
                    new = ranges(self.starts, lengths, device)
                    made[device] = new.new_zeros(self.size).index_copy(0, new, source(device))
                layer.keys, layer.values = layer.keys[made[device]], layer.values[made[device]]


class RaggedLayer(DynamicLayer):
    """Keys and values [C, H_kv, D] of all rows; what concerns rows is done by the cache, for all layers at once."""

    is_croppable = True
    keys: Any
    values: Any

    def __init__(self, rows: RaggedRows):
        super().__init__()
        self.rows = rows

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, size = key_states.dtype, key_states.device, self.rows.size
        self.keys, self.values = (t.new_zeros(size, t.shape[1], t.shape[3]) for t in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the new slots of all rows, [1, H_kv, N, D]; returns the whole storage."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self.keys.is_inference() and not torch.is_inference_mode_enabled():
            self.keys, self.values = self.keys.clone(), self.values.clone()
        places = self.rows.step.places(self.keys.device)
        self.keys.index_copy_(0, places, key_states[0].transpose(0, 1))
        self.values.index_copy_(0, places, value_states[0].transpose(0, 1))
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return max(self.rows.lengths) if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # So Transformers makes no mask: rows know their own causality.
        return query_length, 0


def ranges(starts: Iterable[int], lengths: Sequence[int], device: torch.device) -> Tensor:
    """int64 [sum(lengths)]: `lengths[b]` numbers from `starts[b]` on, for one row after the other."""
    if max(lengths, default=0) <= 1:
        return on_device([start for start, length in zip(starts, lengths, strict=True) if length], device)
    ends = list(accumulate(lengths))
    shifts = [start - end + length for start, end, length in zip(starts, ends, lengths, strict=True)]
    if len(shifts) == 1:
        return torch.arange(shifts[0], shifts[0] + ends[0], device=device)
    shift, count = on_device([shifts, list(lengths)], device)
    return torch.arange(ends[-1], device=device) + shift.repeat_interleave(count, output_size=ends[-1])


def make_ragged(cache: Any, batch_size: int) -> bool:
    """Give a cache ragged layers, with what it holds so far; False where its layers are of a kind of their own."""
    if cache.ragged_rows is not None:
        return True
    kinds = {type(layer) for layer in cache.layers} | {cache.layer_class_to_replicate or DynamicLayer}
    if kinds != {DynamicLayer} or cache.offloading:
        return False
    rows, old = RaggedRows(batch_size), cache.layers
    cache.ragged_rows, cache.layers = rows, [RaggedLayer(rows) for _ in old]
    if cache.layer_class_to_replicate is not None:
        cache.layer_class_to_replicate = partial(RaggedLayer, rows)
    if cache.slot_lengths is None or not old:
        return True
    held = cache.slot_lengths > 0
    index, counts = held.flatten().nonzero().squeeze(1), held.sum(1).tolist()
    if not any(counts):  # nothing but padding
        return True
    rows.reserve(cache.layers, counts)
    rows.advance(counts)
    for new, layer in zip(cache.layers, old, strict=True):
        if layer.is_initialized:
            states = (t.transpose(1, 2).flatten(0, 1)[index.to(t.device)] for t in (layer.keys, layer.values))
            new.update(*(t.transpose(0, 1)[None] for t in states))
    return True


__all__ = ["RaggedLayer", "RaggedRows", "RaggedStep", "make_ragged", "ranges"]
