"""Figures that tables, plots and targets draw from the raw samples."""

from __future__ import annotations

import statistics
from typing import Any

from .clock import median_ratio
from .stage_clock import ENCODER
from .variants import PADDED, PLAIN_M, PLAIN_N, RAGGED

Result = dict[str, Any]


def best_variant(cell: Result) -> str:
    """The variant of SemToken that a cell is judged by: ragged where there is one."""
    return RAGGED if RAGGED in cell["variants"] else PADDED


def ratio_to(cell: Result, variant: str, reference: str, time: str) -> float | None:
    """Seconds of `reference` over those of `variant`, median over rounds; None where one was skipped."""
    variants = cell["variants"]
    if variant not in variants or reference not in variants:
        return None
    return median_ratio(variants[reference][time], variants[variant][time])


def to_limit(cell: Result, variant: str) -> float | None:
    """A whole generate over that of plain Llama on m tokens."""
    return ratio_to(cell, PLAIN_M, variant, "generate")


def speedup(cell: Result, variant: str, time: str) -> float | None:
    """How much faster than plain Llama on n tokens."""
    return ratio_to(cell, variant, PLAIN_N, time)


def stage_seconds(cell: Result) -> dict[str, float]:
    """Median seconds of every part of the stage."""
    names = dict.fromkeys(name for sample in cell["stages"] for name in sample)
    return {name: statistics.median(sample.get(name, 0.0) for sample in cell["stages"]) for name in names}


def stage_share(cell: Result, encoder: bool, time: str = "prefill") -> float | None:
    """Share of the encoder, or of the stage without it, in a time of SemToken; median over rounds."""
    variant = best_variant(cell)
    if variant not in cell["variants"] or not cell["stages"]:
        return None
    parts = [
        sample.get(ENCODER, 0.0) if encoder else sum(s for name, s in sample.items() if name != ENCODER)
        for sample in cell["stages"]
    ]
    return median_ratio(parts, cell["variants"][variant][time])


def kv_overhead(cell: Result, variant: str) -> float | None:
    """Bytes of the cache over those of the rows' own slots."""
    if variant not in cell["variants"]:
        return None
    found = cell["variants"][variant]
    return found["kv_bytes"] / (sum(found["slots"]) * cell["slot_bytes"])


def per_token(result: Result) -> dict[str, float | None]:
    """Of the stage alone: microseconds per token with and without the encoder, and peak bytes per token."""
    n, median = result["length"], statistics.median
    peak = result["peak_bytes"]
    return {
        "us": 1e6 * median(result["seconds"]) / n,
        "encoder_us": 1e6 * median(result["encoder_seconds"]) / n,
        "bytes": None if peak is None else peak / n,
    }


__all__ = [
    "best_variant",
    "kv_overhead",
    "per_token",
    "ratio_to",
    "speedup",
    "stage_seconds",
    "stage_share",
    "to_limit",
]
