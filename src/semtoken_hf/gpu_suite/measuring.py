"""One way of reading a prompt, timed: prefill, decode, and a whole `generate`."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cache_bytes import cache_bytes
from ..cache_semtoken import tracks_slots
from ..evaluation.side_by_side import CallTimer, timed
from .parts import free_memory
from .peak_memory import PeakMemory

NEW_TOKENS, STEPS = 64, 16
# Calls that take longer than this are measured once.
SHORT_SECONDS, REPETITIONS = 2.0, 3


@dataclass(frozen=True)
class Way:
    """How a prompt is read: arguments of `forward` and `generate`, and how much shorter the prompt is."""

    name: str
    arguments: dict[str, Any]
    shortened: float = 1.0

    def prompt(self, ids: Tensor) -> Tensor:
        return ids[:, : math.ceil(ids.shape[1] / self.shortened)]


def ways_at(ratio: float) -> tuple[Way, Way, Way]:
    """Plain at n tokens, plain at m (the limit), and SemToken from n to m."""
    return (
        Way("plain at n", {"compression": False}),
        Way("plain at m", {"compression": False}, ratio),
        Way("SemToken", {"target_ratio": ratio}),
    )


def _prefill(model: Any, ids: Tensor, way: Way) -> Any:
    return model(ids, logits_to_keep=1, use_cache=True, **way.arguments)


def _decode(model: Any, out: Any, way: Way) -> None:
    arguments = {"compression": False} if "compression" in way.arguments else {}
    for _ in range(STEPS):
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        out = model(token, past_key_values=out.past_key_values, logits_to_keep=1, **arguments)


def _generate(model: Any, ids: Tensor, way: Way) -> Any:
    lengths = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **lengths, **way.arguments)


def measure_way(model: Any, ids: Tensor, way: Way, generates: bool = True) -> dict[str, Any]:
    """Medians of repeated calls (one where a call is long), after one to warm up.

    Returns:
        way, tokens, slots; `prefill ms`, `encoder ms` (within it), `decode ms` per token, `generate+64 ms`; `KV bytes`
        after the prefill and `peak bytes` of prefill and decode beyond the model.
    """
    prompt = way.prompt(ids)
    with PeakMemory(model.device) as peak:
        warm, out = timed(lambda: _prefill(model, prompt, way))
        cache = out.past_key_values
        tokens, held = prompt.shape[1], cache_bytes(cache)
        slots = int(cache.compressed_lengths.max()) if tracks_slots(cache) else tokens
        del cache
        _decode(model, out, way)
    del out
    prefills, encoders, decodes, wholes = [], [], [], []
    for _ in range(REPETITIONS if warm < SHORT_SECONDS else 1):
        with CallTimer(model.base_model.semantic_encoder) as timer:
            seconds, out = timed(lambda: _prefill(model, prompt, way))
        prefills.append(seconds)
        encoders.append(timer.seconds)
        decodes.append(timed(lambda out=out: _decode(model, out, way))[0] / STEPS)
        del out
        free_memory()
        if generates:
            wholes.append(timed(lambda: _generate(model, prompt, way))[0])
    median = statistics.median
    return {
        "way": way.name,
        "tokens": tokens,
        "slots": slots,
        "prefill ms": 1e3 * median(prefills),
        "encoder ms": 1e3 * median(encoders),
        "decode ms": 1e3 * median(decodes),
        "generate+64 ms": 1e3 * median(wholes) if wholes else None,
        "KV bytes": held,
        "peak bytes": peak.bytes,
    }
