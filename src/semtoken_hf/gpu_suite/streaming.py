"""A prompt of up to a million tokens, read in chunks of slots: time, cache and peak memory."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from ..cache_bytes import cache_bytes
from ..cache_semtoken import tracks_slots
from ..evaluation.side_by_side import timed
from .parts import time_limit
from .peak_memory import PeakMemory

NEW_TOKENS = 8


def stream_prompt(
    model: Any, ids: Tensor, chunk: int, deadline: float, target_ratio: float | None, new_tokens: int = NEW_TOKENS
) -> dict[str, Any]:
    """`generate` with `prefill_chunk_size`, once.

    Args:
        model: SemToken.
        ids: int64 [1, n].
        chunk: slots (or tokens) that the layers read at a time.
        deadline: `time.time()` from which on no layer begins.
        target_ratio: tokens per slot; None: the plain model.
        new_tokens: at least 2; the first one needs no step.

    Returns:
        way, tokens, slots, `stage s` (compression alone, a run of its own), `prefill s`, `decode ms` per token,
        `KV bytes` behind the last step, `peak bytes` beyond the model, `peak beyond the cache`.

    Raises:
        TimeUp: the deadline has passed.
    """
    way = {"compression": False} if target_ratio is None else {"target_ratio": target_ratio}
    options = {"attention_mask": torch.ones_like(ids), "prefill_chunk_size": chunk, "do_sample": False, **way}
    stage = None
    if target_ratio is not None:
        stage = timed(lambda: model.compress(ids, target_ratio=target_ratio).slot_counts)[0]
    with PeakMemory(model.device) as peak, time_limit(model, deadline):
        out, start, ends = _generate(model, ids, new_tokens, options)
    cache = out.past_key_values
    held = cache_bytes(cache)
    # Plain prefill in chunks may compute logits of every chunk; the steps are the last calls.
    first, read_again = len(ends) - new_tokens, new_tokens - 1
    return {
        "way": "plain" if target_ratio is None else f"SemToken {target_ratio:g}x",
        "tokens": ids.shape[1],
        "slots": int(cache.compressed_lengths.max()) - read_again if tracks_slots(cache) else ids.shape[1],
        "stage s": stage,
        "prefill s": ends[first] - start,
        "decode ms": 1e3 * (ends[-1] - ends[first]) / read_again,
        "KV bytes": held,
        "peak bytes": peak.bytes,
        "peak beyond the cache": None if peak.bytes is None else peak.bytes - held,
    }


def _generate(model: Any, ids: Tensor, new_tokens: int, options: dict[str, Any]) -> tuple[Any, float, list[float]]:
    """What `generate` returns, when it began, and when each call of the head was through."""
    ends: list[float] = []

    def note_end(*_: Any) -> None:
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    handle = model.lm_head.register_forward_hook(note_end)
    lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    try:
        start = time.perf_counter()
        return model.generate(ids, return_dict_in_generate=True, **lengths, **options), start, ends
    finally:
        handle.remove()
