"""Rows of different lengths without padding: the attention `semtoken_varlen`, its KV storage and the forward over it.

- `attn_implementation="semtoken_varlen"` reads rows that lie one behind the other, each row its own slots alone: no
  attention, no MLP and no memory for padding. Wherever a call has no such rows it is `sdpa`, bit for bit.
- Every layer holds [C, H_kv, D]: row b owns `capacities[b]` places from `starts[b]` on, of which `lengths[b]` are
  filled. These numbers live on the host, shared by all layers: nothing here waits for the device, unless it says so.
- A row has a little room to grow into; when one is full, all layers are laid out anew.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from importlib import import_module
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

from .adapter_semtoken import adapter_acts_on
from .cache_semtoken import Turn
from .logging_semtoken import get_logger
from .token_layout import on_device

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


class SemTokenRaggedMixin:
    """What a base model does under `attn_implementation="semtoken_varlen"`."""

    config: Any
    training: bool

    def _makes_ragged(self, cache: Any, batch_size: int) -> bool:
        """Whether `cache` holds each row's slots alone from now on; asked once something merges."""
        if getattr(cache, "ragged_rows", None) is not None:
            return True
        if self.config._attn_implementation != VARLEN or not hasattr(cache, "ragged_rows"):
            return False
        # Its layers are written in place, which gradients and graphs cannot bear.
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        # A window holds whatever the layers are, and a ragged row knows of none.
        if getattr(self.config, "sliding_window", None) is None and make_ragged(cache, batch_size):
            return True
        logger.warning_once(
            f"`{VARLEN}` pads this cache as `sdpa` does: layers that are quantised, offloaded or have a sliding window "
            "cannot hold rows of different lengths."
        )
        return False

    def _run_ragged(
        self, turn: Turn, last_columns: int, use_cache: bool | None, chunk_size: int | None, **kwargs: Any
    ) -> BaseModelOutputWithPast:
        """The family's forward over the new slots of all rows as one row.

        Args:
            turn: with `counts`.
            last_columns: of a single row without padding, the last columns whose states are read; 0: all of them.
            chunk_size: run over this many slots a row at a time.

        Returns:
            states [B, Q, H], zero at padding, or the last columns of them; `hidden_states` alike, but packed,
            [1, n, H], of the last of several chunks.

        Raises:
            ValueError: the model was given another attention since the cache became ragged.
        """
        if self.config._attn_implementation != VARLEN:
            raise ValueError(
                f"this cache holds rows of different lengths, which only `{VARLEN}` can read, and the model's "
                f"attention is now `{self.config._attn_implementation}`: set it back, or start with an empty cache"
            )
        columns, cache, index, counts, gate = turn.columns, turn.cache, turn.index, turn.counts, turn.adapted
        assert counts is not None
        assert turn.position_ids is not None
        rows, width = columns.shape[:2]
        packed, positions = columns.flatten(0, 1), turn.position_ids.expand(rows, -1).flatten()
        gate = gate[:, None].expand(rows, width).flatten() if isinstance(gate, Tensor) else None
        if index is not None:
            packed, positions = packed[index], positions[index]
            gate = None if gate is None else gate.to(index.device)[index]
        cache.ragged_rows.reserve(cache.layers, counts)
        chunk, states = (chunk_size or width) * rows, []
        keeps_all = not last_columns or rows > 1 or index is not None
        for start in range(0, len(packed), chunk):
            part = slice(start, start + chunk)
            step = cache.ragged_rows.advance(_overlap(counts, part))
            with adapter_acts_on(None if gate is None else gate[None, part]):
                outputs = super().forward(  # type: ignore[misc]
                    **{turn.name: packed[None, part]},
                    attention_mask=None,
                    position_ids=positions[None, part],
                    past_key_values=cache,
                    use_cache=use_cache,
                    **{**kwargs, "return_dict": True, "ragged_attention": partial(attend_ragged, step=step)},
                )
            if keeps_all or part.stop > len(packed) - last_columns:
                states.append(outputs.last_hidden_state)
        outputs.last_hidden_state = _lay_out(torch.cat(states, 1), index, rows, width)
        if outputs.hidden_states is not None and len(states) == 1:
            outputs.hidden_states = tuple(_lay_out(layer, index, rows, width) for layer in outputs.hidden_states)
        return outputs


def _lay_out(packed: Tensor, index: Tensor | None, rows: int, width: int) -> Tensor:
    """[1, N, H] as [rows, width, H]."""
    if index is not None:
        empty = packed.new_zeros(rows * width, packed.shape[-1])
        packed = empty.index_copy(0, index.to(packed.device), packed[0])
    return packed.view(rows, -1, packed.shape[-1])


def _overlap(counts: list[int], part: slice) -> list[int]:
    """How many slots of each row lie in a part of the packed rows."""
    ends = list(accumulate(counts))
    return [max(min(end, part.stop) - max(end - count, part.start), 0) for count, end in zip(counts, ends, strict=True)]


__all__ = [
    "RaggedLayer",
    "RaggedRows",
    "RaggedStep",
    "SemTokenRaggedMixin",
    "VARLEN",
    "attend_ragged",
    "make_ragged",
    "ranges",
]
