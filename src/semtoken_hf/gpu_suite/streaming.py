"""A prompt of up to a million tokens, read in chunks of slots: time, cache and peak memory."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..benchmarking.clock import TokenStamps, peak_extra_bytes, seconds_of
from ..benchmarking.variants import PADDED, PLAIN_N, Variant, kv_bytes
from ..cache_semtoken import is_semtoken_cache
from .models import prompts
from .parts import time_limit

NEW_TOKENS = 8


def stream_prompt(
    model: Any, length: int, chunk: int, deadline: float, target_ratio: float | None, new_tokens: int = NEW_TOKENS
) -> dict[str, Any]:
    """`generate` with `prefill_chunk_size`, once.

    Args:
        model: SemToken.
        length: of the prompt, in tokens.
        chunk: slots (or tokens) that the layers read at a time.
        deadline: `time.time()` from which on no layer begins.
        target_ratio: tokens per slot; None: compression off.
        new_tokens: at least 2; the first one needs no step.

    Returns:
        variant, tokens, slots, `stage s` (compression alone, a run of its own), `prefill s`, `decode ms` per token,
        `KV bytes` behind the last step, `peak bytes` beyond the model, `peak beyond the cache`.

    Raises:
        TimeUp: the deadline has passed.
    """
    batch, stage = prompts((length,), model.device), None
    call: dict[str, Any] = {"compression": False} if target_ratio is None else {"target_ratio": target_ratio}
    if target_ratio is not None:
        stage = seconds_of(partial(model.compress, batch.input_ids, **call))
    call["prefill_chunk_size"] = chunk
    name = PLAIN_N if target_ratio is None else PADDED
    variant, stamps = Variant(name, model, batch, model.config._attn_implementation, call), []

    def read() -> Any:
        stamps.append(TokenStamps())
        return variant.generate(new_tokens, streamer=stamps[0], return_dict_in_generate=True).past_key_values

    with time_limit(model, deadline):
        peak, cache = peak_extra_bytes(read, model.device)
    held = kv_bytes(cache)
    return {
        "variant": "plain" if target_ratio is None else f"SemToken {target_ratio:g}x",
        "tokens": length,
        "slots": int(cache.compressed_lengths.max()) - (new_tokens - 1) if is_semtoken_cache(cache) else length,
        "stage s": stage,
        "prefill s": stamps[0].to_first_token,
        "decode ms": 1e3 * stamps[0].per_token,
        "KV bytes": held,
        "peak bytes": peak,
        "peak beyond the cache": None if peak is None else peak - held,
    }
