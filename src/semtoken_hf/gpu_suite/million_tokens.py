"""Part: one million tokens through a model whose plain cache does not fit beside its weights."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from ..benchmarking.shapes import ModelShape, shape_of
from ..configuration_semtoken import SemTokenStaticEncoderConfig
from ..varlen_semtoken import VARLEN
from .machine import has_flash_attention, has_torch_varlen
from .measuring import RATIO
from .models import build_model
from .parts import Context, free_memory
from .streaming import stream_prompt

CHUNK, SHORTEST = 4096, 131072
# Activations of a chunk, logits, and what the allocator cannot use.
SPARE_BYTES = 2**31
# Of the whole, for the two short runs that the time of the long one is told from.
PROBES = (1 / 32, 1 / 8)
CAUTION = 1.2


def streaming_attention(device: torch.device) -> str:
    """What reads a chunk behind a long cache without a mask of chunk x cache."""
    has_kernel = has_flash_attention() or has_torch_varlen()
    return VARLEN if device.type == "cuda" and has_kernel else "sdpa"


def bytes_needed(shape: ModelShape, dtype: torch.dtype, length: int, implementation: str) -> int:
    """Weights, and the larger of two: making the slots, or reading them.

    Making: the fingerprints of all tokens and their spans' means in float32, and three times the slots' embeddings
    while they get their residuals. Reading: the slots' embeddings, their cache, and one layer's again while it grows;
    SDPA also repeats keys and values and makes a mask.
    """
    slots = math.ceil(length / RATIO)
    embeddings, cache = dtype.itemsize * shape.hidden_size * slots, shape.slot_bytes(dtype) * slots
    layer = cache // shape.num_hidden_layers
    reading = embeddings + cache + layer
    if implementation == "sdpa":
        reading += layer * shape.num_attention_heads // shape.num_key_value_heads + 3 * CHUNK * slots
    making = 4 * SemTokenStaticEncoderConfig.hidden_size * (length + slots) + 3 * embeddings
    return shape.weight_bytes(dtype) + max(reading, making) + SPARE_BYTES


def predict_seconds(short: dict[str, Any], longer: dict[str, Any], tokens: int) -> float:
    """Prefill seconds at `tokens` from two shorter runs: a n + b n^2."""
    (n, s), (m, t) = ((record["tokens"], record["prefill s"]) for record in (short, longer))
    quadratic = max((t / m - s / n) / (m - n), 0.0)
    return CAUTION * ((t / m - quadratic * m) * tokens + quadratic * tokens**2)


def _note_plain(context: Context, name: str) -> None:
    shape, length = shape_of(name), context.long_length
    plain, weights = shape.slot_bytes(context.dtype) * length, shape.weight_bytes(context.dtype)
    memory = torch.cuda.mem_get_info(context.device)[1]
    context.row(
        **{"by arithmetic": f"plain {name} at {length:,} tokens", "KV GB": plain / 1e9, "weights GB": weights / 1e9},
        **{"this device GB": memory / 1e9, "fits": weights + plain < memory},
    )


def stream_million_tokens(context: Context) -> None:
    """The longest of `long_length` and its halves, down to 131,072, that memory and time allow."""
    name, free = context.shapes[-1], context.free_bytes()
    if context.device.type == "cuda":
        _note_plain(context, name)
    lengths = [context.long_length >> i for i in range(4)]
    lengths = [n for n in lengths if n >= min(SHORTEST, context.long_length)]
    implementation, shape = streaming_attention(context.device), shape_of(name)
    fitting = [n for n in lengths if bytes_needed(shape, context.dtype, n, implementation) < free]
    if fitting != lengths:
        left_out = ", ".join(f"{n:,}" for n in lengths if n not in fitting)
        context.note(f"{free / 1e9:.0f} GB are free, too few for {left_out} tokens.")
    if not fitting:
        return
    context.note(f"{name}, attention {implementation}, chunks of {CHUNK:,} slots, the checkpoint's static encoder.")
    model = build_model(shape, context.device, context.dtype, attn_implementation=implementation)
    try:
        _stream(context, model, fitting)
    finally:
        del model
        free_memory()


def _stream(context: Context, model: Any, lengths: list[int]) -> None:
    def run(length: int) -> Any:
        stream = partial(stream_prompt, model, length, CHUNK, context.deadline, RATIO)
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
