"""One variant of reading a prompt, timed within a deadline."""

from __future__ import annotations

import statistics
from typing import Any

from torch import nn

from ..benchmarking.clock import seconds_of
from ..benchmarking.variants import TITLES, Variant
from ..evaluation.side_by_side import CallTimer
from .parts import time_limit

RATIO, NEW_TOKENS = 2.4, 64
# A variant whose prefill takes longer than this is measured once.
SHORT_SECONDS, REPETITIONS = 2.0, 3


def measure_variant(variant: Variant, encoder: nn.Module, deadline: float) -> dict[str, Any]:
    """Medians of a few rounds (one where a prefill is long), after a prefill to warm up.

    Args:
        encoder: of the SemToken model.
        deadline: `time.time()` from which on no layer begins.

    Returns:
        variant, tokens, slots; `prefill ms`, `encoder ms` (within it), `decode ms` per token, `generate+64 ms`; `KV
        bytes` after the prefill and its `peak bytes` beyond the model.

    Raises:
        TimeUp: the deadline has passed.
    """
    samples, found = [], {}
    with time_limit(variant.model, deadline):
        warm = seconds_of(lambda: found.update(variant.inspect()))
        for _ in range(REPETITIONS if warm < SHORT_SECONDS else 1):
            with CallTimer(encoder) as timer:
                samples.append(variant.measure(NEW_TOKENS))
            samples[-1]["encoder"] = timer.seconds
    median = {name: 1e3 * statistics.median(sample[name] for sample in samples) for name in samples[0]}
    return {
        "variant": TITLES[variant.name],
        "tokens": max(variant.batch.lengths),
        "slots": max(found["slots"]),
        "prefill ms": median["prefill"],
        "encoder ms": median["encoder"],
        "decode ms": median["decode"],
        "generate+64 ms": median["generate"],
        "KV bytes": found["kv_bytes"],
        "peak bytes": found["peak_bytes"],
    }
