"""Part: one million tokens through a model whose plain cache does not fit beside its weights."""

from __future__ import annotations

import math
from typing import Any

import torch

from .machine import VARLEN, has_flash_attention, has_own_varlen
from .models import SHAPES, build_model, kv_bytes, text_ids, weight_bytes
from .parts import Context, free_memory
from .streaming import stream_prompt

RATIO, CHUNK, SHORTEST = 2.4, 4096, 131072
# Activations of a chunk, logits, and what the allocator cannot use.
SPARE_BYTES = 2**31
# Of the whole, for the two short runs that the time of the long one is told from.
PROBES = (1 / 32, 1 / 8)
CAUTION = 1.2


def streaming_attention(device: torch.device) -> str:
    """What reads a chunk behind a long cache without a mask of chunk x cache, best first."""
    if device.type == "cuda" and has_own_varlen():
        return VARLEN
    return "flash_attention_2" if device.type == "cuda" and has_flash_attention() else "sdpa"


def bytes_needed(shape: str, length: int, implementation: str) -> int:
    """Weights, and the larger of two: all embeddings, gathered once, while slots are made; or the slots' embeddings,
    their cache, and one layer's again while it grows. SDPA also repeats keys and values and makes a mask."""
    hidden, _, layers, heads, kv_heads, *_ = SHAPES[shape]
    slots = math.ceil(length / RATIO)
    cache = kv_bytes(shape, slots)
    reading = 2 * hidden * slots + cache + cache // layers
    if implementation == "sdpa":
        reading += cache // layers * heads // kv_heads + 3 * CHUNK * slots
    return weight_bytes(shape) + max(reading, 4 * hidden * length) + SPARE_BYTES


def predict_seconds(short: dict[str, Any], longer: dict[str, Any], tokens: int) -> float:
    """Prefill seconds at `tokens` from two shorter runs: a n + b n^2."""
    (n, s), (m, t) = ((record["tokens"], record["prefill s"]) for record in (short, longer))
    quadratic = max((t / m - s / n) / (m - n), 0.0)
    return CAUTION * ((t / m - quadratic * m) * tokens + quadratic * tokens**2)


def _note_plain(context: Context, shape: str, length: int, memory: int) -> None:
    plain, weights = kv_bytes(shape, length), weight_bytes(shape)
    fits = weights + plain < memory
    context.row(
        **{"by arithmetic": f"plain {shape} at {length:,} tokens", "KV GB": plain / 1e9, "weights GB": weights / 1e9},
        **{"this device GB": memory / 1e9, "fits": fits},
    )


def stream_million_tokens(context: Context) -> None:
    """The longest of `long_length` and its halves, down to 131,072, that memory and time allow."""
    shape, on_gpu = context.shapes[-1], context.device.type == "cuda"
    free = torch.cuda.mem_get_info(context.device)[0] if on_gpu else 2**62
    if on_gpu:
        _note_plain(context, shape, context.long_length, torch.cuda.mem_get_info(context.device)[1])
    lengths = [context.long_length >> i for i in range(4)]
    lengths = [n for n in lengths if n >= min(SHORTEST, context.long_length)]
    implementation = streaming_attention(context.device)
    fitting = [n for n in lengths if bytes_needed(shape, n, implementation) < free]
    if fitting != lengths:
        left_out = ", ".join(f"{n:,}" for n in lengths if n not in fitting)
        context.note(f"{free / 1e9:.0f} GB are free, too few for {left_out} tokens.")
    if not fitting:
        return
    context.note(f"{shape}, attention {implementation}, chunks of {CHUNK:,} slots, static encoder with a random table.")
    model = build_model(shape, context.device, context.dtype, attn_implementation=implementation)
    try:
        _stream(context, model, fitting)
    finally:
        del model
        free_memory()


def _stream(context: Context, model: Any, lengths: list[int]) -> None:
    def run(length: int) -> Any:
        def stream() -> dict[str, Any]:
            return stream_prompt(model, text_ids(length, context.device), CHUNK, context.deadline, RATIO)

        record = context.attempt(f"{length:,} tokens", stream)
        if record is not None:
            context.row(**record)
        return record

    # The first run warms up, too: the same length again tells the time.
    probes = [run(int(share * lengths[0])) for share in (PROBES[0], *PROBES)]
    for length in lengths:
        if all(probes):
            seconds = predict_seconds(probes[1], probes[2], length)
            if seconds > context.left():
                context.note(
                    f"{length:,} tokens would take about {seconds:.0f} s, and {context.left():.0f} s are left."
                )
                continue
        if run(length) is not None:
            if length < context.long_length:
                context.note(f"{length:,} tokens instead of {context.long_length:,}.")
            return
