"""Part: what SemToken saves on models of real shapes, by prompt length."""

from __future__ import annotations

import time
from typing import Any

import torch

from .machine import has_flash_attention
from .measuring import Way, measure_way, ways_at
from .models import build_model, kv_bytes, text_ids, weight_bytes
from .parts import Context, free_memory, time_limit

RATIO = 2.4
# Attention is quadratic: a prompt twice as long takes at most this much longer.
GROWTH = 4.0
BENCHMARKED = ("llama-2-7b", "llama-3-8b")


def _fits(context: Context, shape: str, length: int) -> bool:
    """Whether the cache of a plain prompt and what grows it by one layer fit into the free memory."""
    if context.device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(context.device)
    return 1.25 * kv_bytes(shape, length) < free


def _record_ratios(context: Context, shape: str, length: int, records: dict[str, dict[str, Any]]) -> None:
    ours, at_n, at_m = records.get("SemToken"), records.get("plain at n"), records.get("plain at m")
    if ours is None:
        return
    for name in ("prefill ms", "decode ms", "generate+64 ms", "KV bytes", "peak bytes"):
        of_n, of_m = (r and r[name] and ours[name] and r[name] / ours[name] for r in (at_n, at_m))
        context.row(shape=shape, tokens=length, figure=name, **{"plain at n / ours": of_n, "plain at m / ours": of_m})


def measure_length(context: Context, model: Any, shape: str, length: int) -> None:
    """Every way at one length; a way that does not fit is noted, the others are still measured."""
    ids, records = text_ids(length, context.device), {}
    for way in ways_at(RATIO):
        if way.name == "plain at n" and not _fits(context, shape, length):
            context.note(f"{shape}, {length:,} tokens, {way.name}: its cache does not fit into the free memory.")
            continue

        def measure(way: Way = way) -> dict[str, Any]:
            with time_limit(model, context.deadline):
                return measure_way(model, ids, way)

        record = context.attempt(f"{shape}, {length:,} tokens, {way.name}", measure)
        if record is not None:
            records[way.name] = record
            context.row(shape=shape, **record)
    _record_ratios(context, shape, length, records)


def measure_shape(context: Context, shape: str) -> None:
    """Lengths from the shortest on, as long as the next one fits into the time."""
    implementation = "flash_attention_2" if has_flash_attention() and context.device.type == "cuda" else "sdpa"
    model = build_model(shape, context.device, context.dtype, attn_implementation=implementation)
    context.note(f"{shape}: attention {implementation}.")
    taken = 0.0
    try:
        for length in context.lengths:
            if GROWTH * taken > context.left():
                context.note(f"{shape}: no time left for {length:,} tokens and more.")
                break
            start = time.time()
            measure_length(context, model, shape, length)
            taken = time.time() - start
    finally:
        del model
        free_memory()


def run_benchmark(context: Context) -> None:
    """Plain at n, plain at m (the limit) and SemToken, shape by shape; they share the time."""
    context.note(
        f"Random weights, real text, static encoder with a random table, {RATIO} tokens a slot, batch 1. Peak bytes: "
        "of prefill and decode beyond the model."
    )
    shapes = [shape for shape in context.shapes if shape in BENCHMARKED] or [context.shapes[-1]]
    end = context.deadline
    for rest, shape in zip(range(len(shapes), 0, -1), shapes, strict=True):
        if context.device.type == "cuda" and 1.1 * weight_bytes(shape) > torch.cuda.mem_get_info(context.device)[0]:
            context.note(f"{shape}: its weights ({weight_bytes(shape) / 2**30:.1f} GiB) do not fit.")
            continue
        context.deadline = time.time() + max(end - time.time(), 0) / rest
        context.attempt(shape, lambda shape=shape: measure_shape(context, shape))
    context.deadline = end
