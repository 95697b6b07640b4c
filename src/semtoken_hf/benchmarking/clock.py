"""Seconds and bytes of a call.

Of the package it imports nothing: the environment of the kvpress baselines, which cannot install it, loads it too.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Measurement, TaskSpec, timer
from transformers.generation.streamers import BaseStreamer


def seconds_of(call: Callable[[], Any]) -> float:
    """Seconds of one call, with the clock of `torch.utils.benchmark`, which waits for the device.

    Its `Timer` would run the call twice before it measures: where that takes minutes, the first round is enough.
    """
    return timeit.Timer(call, timer=timer).timeit(1)


def summary(samples: list[float]) -> dict[str, float]:
    """Median, interquartile range and number of `samples`."""
    found = Measurement(1, list(samples), TaskSpec("", ""))
    return {"median": found.median, "iqr": found.iqr, "samples": len(samples)}


def median_ratio(above: list[float], below: list[float]) -> float:
    """Median of the ratios within each round, which what slows the whole machine for a while does not touch."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def rounds_left(first: float, budget: float, most: int) -> int:
    """Rounds to measure after a first one of `first` seconds; 0: the first one has to do."""
    return min(most, int(budget / max(first, 1e-9)) - 1) if 2 * first <= budget else 0


class TokenStamps(BaseStreamer):
    """Handed to `generate` as `streamer`: when each new token was there."""

    def __init__(self) -> None:
        self.begin = timer()
        # The prompt comes first.
        self.stamps: list[float] = []

    def put(self, value: Any) -> None:
        self.stamps.append(timer())

    def end(self) -> None: ...

    @property
    def to_first_token(self) -> float:
        """Seconds from the call of `generate` to the first new token."""
        return self.stamps[1] - self.begin

    @property
    def per_token(self) -> float:
        """Seconds of a further token."""
        return (self.stamps[-1] - self.stamps[1]) / (len(self.stamps) - 2)


def peak_extra_bytes(call: Callable[[], Any], device: torch.device) -> tuple[int | None, Any]:
    """Bytes that `call` needed at its peak beyond what was held before, and its result.

    On CUDA of the allocator; on a CPU of the whole process, and None where the system does not tell (it is no Linux).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, result
    try:
        # Freed memory that the C library keeps would hide what is taken out of it again.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        start = _process_bytes("VmRSS")
    except (OSError, AttributeError):
        return None, call()
    result = call()
    return max(0, _process_bytes("VmHWM") - start), result


def _process_bytes(name: str) -> int:
    return _kilobytes(Path("/proc/self/status"), name) * 1024


def _kilobytes(path: Path, name: str) -> int:
    line = next(line for line in path.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1])


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can still be had; None where the system does not tell."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    info = Path("/proc/meminfo")
    return _kilobytes(info, "MemAvailable") * 1024 if info.exists() else None


__all__ = [
    "TokenStamps",
    "available_bytes",
    "median_ratio",
    "peak_extra_bytes",
    "rounds_left",
    "seconds_of",
    "summary",
]
