"""Part: what SemToken saves on models of real shapes, by prompt length."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from ..benchmarking.models import plain_twin
from ..benchmarking.shapes import shape_of
from ..benchmarking.variants import PADDED, PLAIN_M, PLAIN_N, TITLES, list_variants
from .machine import has_flash_attention
from .measuring import RATIO, measure_variant
from .models import build_model, prompts
from .parts import Context, free_memory

# Attention is quadratic: a prompt twice as long takes at most this much longer.
GROWTH = 4.0
BENCHMARKED = ("llama-2-7b", "llama-3-8b")
FIGURES = ("prefill ms", "decode ms", "generate+64 ms", "KV bytes", "peak bytes")


def _record_ratios(context: Context, shape: str, length: int, records: dict[str, dict[str, Any]]) -> None:
    if PADDED not in records:
        return
    for name in FIGURES:
        row: dict[str, Any] = {"shape": shape, "tokens": length, "figure": name}
        for other in (PLAIN_N, PLAIN_M):
            ours, theirs = (records.get(variant, {}).get(name) for variant in (PADDED, other))
            row[f"{TITLES[other]} / {TITLES[PADDED]}"] = theirs / ours if ours and theirs else None
        context.row(**row)


def measure_length(context: Context, model: Any, plain: Any, shape: str, length: int) -> None:
    """Every variant at one length; a variant that does not fit is noted, the others are still measured."""
    what = f"{shape}, {length:,} tokens"
    batch, attention = prompts((length,), context.device), model.config._attn_implementation
    variants = context.attempt(f"{what}, slots", partial(list_variants, model, plain, batch, RATIO, attention))
    records: dict[str, dict[str, Any]] = {}
    for variant in variants or ():
        # What grows the cache by one layer stands beside it.
        if variant.name == PLAIN_N and 1.25 * shape_of(shape).slot_bytes(context.dtype) * length > context.free_bytes():
            context.note(f"{what}, {TITLES[variant.name]}: its cache does not fit into the free memory.")
            continue
        encoder, title = model.base_model.semantic_encoder, TITLES[variant.name]
        record = context.attempt(f"{what}, {title}", partial(measure_variant, variant, encoder, context.deadline))
        if record is not None:
            records[variant.name] = record
            context.row(shape=shape, **record)
    _record_ratios(context, shape, length, records)


def measure_shape(context: Context, shape: str) -> None:
    """Lengths from the shortest on, as long as the next one fits into the time."""
    implementation = "flash_attention_2" if has_flash_attention() and context.device.type == "cuda" else "sdpa"
    model = build_model(shape_of(shape), context.device, context.dtype, attn_implementation=implementation)
    plain = plain_twin(model)
    context.note(f"{shape}: attention {implementation}.")
    taken = 0.0
    try:
        for length in context.lengths:
            if GROWTH * taken > context.left():
                context.note(f"{shape}: no time left for {length:,} tokens and more.")
                break
            start = time.time()
            measure_length(context, model, plain, shape, length)
            taken = time.time() - start
    finally:
        del model, plain
        free_memory()


def run_benchmark(context: Context) -> None:
    """Plain at n, plain at m (the limit) and SemToken, shape by shape; they share the time."""
    context.note(
        f"Random weights, real text, the static encoder of the embedded checkpoint, {RATIO} tokens a slot, batch 1. "
        "Peak bytes: of a prefill beyond the model."
    )
    shapes = [shape for shape in context.shapes if shape in BENCHMARKED] or [context.shapes[-1]]
    end = context.deadline
    for rest, shape in zip(range(len(shapes), 0, -1), shapes, strict=True):
        weights = shape_of(shape).weight_bytes(context.dtype)
        if 1.1 * weights > context.free_bytes():
            context.note(f"{shape}: its weights ({weights / 2**30:.1f} GiB) do not fit.")
            continue
        context.deadline = time.time() + max(end - time.time(), 0) / rest
        context.attempt(shape, partial(measure_shape, context, shape))
    context.deadline = end
