"""One prompt read with and without compression, alternating, through `pipeline("text-generation")`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..cache_bytes import cache_bytes
from ..cache_semtoken import tracks_slots


@dataclass
class Reading:
    """How one way of reading a prompt went.

    Attributes:
        tokens: of the prompt.
        slots: positions that the layers saw.
        kv_bytes: keys and values after prefill.
        prefill_seconds, decode_seconds: to the first token, and per further token; one entry a repetition.
        encoder_seconds: the encoder's part of the prefill; one entry a repetition.
        continuation: generated text.
    """

    tokens: int
    slots: int
    kv_bytes: int
    prefill_seconds: list[float] = field(default_factory=list)
    decode_seconds: list[float] = field(default_factory=list)
    encoder_seconds: list[float] = field(default_factory=list)
    continuation: str = ""


def wait_for_device() -> None:
    """A clock means nothing before the device has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class CallTimer:
    """Adds up the seconds spent in a module's forward, between `with` and its end."""

    def __init__(self, module: torch.nn.Module):
        self.module, self.seconds = module, 0.0

    def __enter__(self) -> CallTimer:
        self._handles = [
            self.module.register_forward_pre_hook(self._start),
            self.module.register_forward_hook(self._stop),
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _start(self, *_: Any) -> None:
        wait_for_device()
        self._since = time.perf_counter()

    def _stop(self, *_: Any) -> None:
        wait_for_device()
        self.seconds += time.perf_counter() - self._since


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that `call` took on its device, and its result."""
    wait_for_device()
    start = time.perf_counter()
    result = call()
    wait_for_device()
    return time.perf_counter() - start, result


def read_side_by_side(
    pipe: Any, prompt: str, max_new_tokens: int, repetitions: int, target_ratio: float | None = None
) -> dict[str, Reading]:
    """Read `prompt` in turn with compression on and off.

    Args:
        pipe: a text-generation pipeline over a SemToken checkpoint.
        prompt: the text.
        max_new_tokens: tokens of the continuation, at least 2.
        repetitions: of each measurement, after one to warm up.
        target_ratio: tokens per slot; None: the checkpoint's.

    Returns:
        `{"plain": ..., "SemToken": ...}`.
    """
    calls: dict[str, dict[str, Any]] = {"plain": {"compression": False}, "SemToken": {"target_ratio": target_ratio}}
    inputs = pipe.tokenizer(prompt, return_tensors="pt").to(pipe.model.device)
    readings = {}
    for name, call in calls.items():
        cache = pipe.model.generate(
            **inputs, **call, max_new_tokens=1, do_sample=False, return_dict_in_generate=True
        ).past_key_values
        tokens = inputs["input_ids"].shape[1]
        slots = int(cache.compressed_lengths.max()) if tracks_slots(cache) else tokens
        readings[name] = Reading(tokens, slots, cache_bytes(cache))
    encoder = pipe.model.base_model.semantic_encoder
    for repetition in range(repetitions + 1):
        for name, call in calls.items():
            options = {"do_sample": False, "return_full_text": False, **call}
            with CallTimer(encoder) as timer:
                first, _ = timed(partial(pipe, prompt, max_new_tokens=1, **options))
            # `min_new_tokens` as well, so that an early end of text does not shorten the measurement.
            lengths = {"max_new_tokens": max_new_tokens, "min_new_tokens": max_new_tokens}
            whole, output = timed(partial(pipe, prompt, **lengths, **options))
            readings[name].continuation = output[0]["generated_text"]
            if repetition:
                readings[name].prefill_seconds.append(first)
                readings[name].decode_seconds.append((whole - first) / (max_new_tokens - 1))
                readings[name].encoder_seconds.append(timer.seconds)
    return readings


def side_by_side_table(readings: dict[str, Reading]) -> str:
    """The readings as a Markdown table of medians, with the ratio plain / SemToken."""
    plain, ours = readings["plain"], readings["SemToken"]
    median = statistics.median

    def row(label: str, pick: Callable[[Reading], float], form: str) -> str:
        return f"| {label} | {pick(plain):{form}} | {pick(ours):{form}} | {pick(plain) / pick(ours):.2f} x |"

    encoder_share = 100 * median(ours.encoder_seconds) / median(ours.prefill_seconds)
    return "\n".join(
        [
            "| | plain | SemToken | plain / SemToken |",
            "|---|---|---|---|",
            f"| prompt tokens | {plain.tokens} | {ours.tokens} | |",
            row("positions read (slots)", lambda r: r.slots, ",.0f"),
            row("KV cache, bytes", lambda r: r.kv_bytes, ",.0f"),
            row("prefill (to the first token), ms", lambda r: 1e3 * median(r.prefill_seconds), ".1f"),
            row("decode, ms per token", lambda r: 1e3 * median(r.decode_seconds), ".2f"),
            f"| encoder's share of prefill | | {encoder_share:.1f} % | |",
        ]
    )
