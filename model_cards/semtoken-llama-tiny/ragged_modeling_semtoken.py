"""The family's layers over rows that lie one behind the other: no attention, no MLP and no memory for padding."""

from __future__ import annotations

from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from .adapter_semtoken import adapter_acts_on
from .attention_semtoken import VARLEN, attend_ragged
from .cached_turn import Turn
from .logging_semtoken import get_logger
from .ragged_cache_semtoken import make_ragged

logger = get_logger(__name__)


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


__all__ = ["SemTokenRaggedMixin"]
