"""Time and memory of reading a prompt and going on, every variant in turn in one process."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from tqdm.auto import tqdm

from ..cache_semtoken import cache_bytes
from .cells import load_model, load_tokenizer
from .configuration import EvaluationConfig, chosen
from .continuation import Prefill, decode_greedily
from .methods import METHODS, Method
from .prompts import Prompt
from .side_by_side import CallTimer, timed
from .texts import window_prompt

# New tokens of the end-to-end time, and how many of them are timed.
NEW_TOKENS, TIMED_TOKENS = 64, 16
# Beyond this length a repetition takes minutes on a CPU.
LONG = 10_000


def measure_speed(config: EvaluationConfig) -> list[dict[str, Any]]:
    """One record for every prompt length and way to read it.

    Returns:
        length, method, checkpoint, title, ratio; slots; kv_bytes behind the prompt; medians prefill_ms (the encoder
        and whatever a method needs to choose included), encoder_ms and decode_ms per token; end_to_end_ms of the
        prefill and 64 new tokens; encoder_share of that; repetitions.
    """
    ids = load_tokenizer(config.checkpoint)(config.read_haystack(), add_special_tokens=False)["input_ids"]
    records = []
    for length in config.lengths:
        long = [*ids] * (length // len(ids) + 1)
        records += _measure_length(config, window_prompt(0, torch.tensor(long[:length]), length))
    return records


def _variants(config: EvaluationConfig, length: int) -> list[tuple[str, Method, str, float | None]]:
    """(checkpoint, method, its name, ratio): the plain model over n and over m tokens, and SemToken.

    At the shortest length every method, and those at every ratio of the curve: for quality against time.
    """
    first, is_shortest = config.ratios[0], length == min(config.lengths)
    variants: list[tuple[str, Method, str, float | None]] = [("", METHODS["full"], "full", None)]
    for ratio in config.curve_ratios if is_shortest else config.ratios:
        variants += [("", METHODS[name], name, ratio) for name in ("truncation", "semtoken")]
    if is_shortest:
        model, known = load_model(config.checkpoint, config.dtype), {name for _, _, name, _ in variants}
        others = [n for n in chosen(config.methods, METHODS) if n not in known and METHODS[n].unfit(model) is None]
        variants += [("", METHODS[name], name, first if METHODS[name].has_budget else None) for name in others]
    return variants + [(name, METHODS["semtoken"], "semtoken", first) for name in config.checkpoint_of]


def _measure_length(config: EvaluationConfig, prompt: Prompt) -> list[dict[str, Any]]:
    variants = _variants(config, prompt.length)
    records = [
        {
            "length": prompt.length,
            "method": name,
            "checkpoint": checkpoint or None,
            "title": f"{method.title}, {checkpoint}" if checkpoint else method.title,
            "ratio": ratio,
        }
        for checkpoint, method, name, ratio in variants
    ]
    repetitions = 5 if prompt.length < LONG else 1
    times: list[list[tuple[float, float, float]]] = [[] for _ in variants]
    for repetition in tqdm(range(repetitions + (repetitions > 1)), desc=f"speed, {prompt.length:,} tokens"):
        for i, (checkpoint, method, _, ratio) in enumerate(variants):
            model = load_model(config.path_of(checkpoint), config.dtype)
            prefill, seconds = _time(model, method, prompt.to(model.device), ratio)
            records[i] |= {"slots": prefill.slots, "kv_bytes": cache_bytes(prefill.cache)}
            if repetition or repetitions == 1:  # the first one warms up
                times[i].append(seconds)
            del prefill
    for record, measured in zip(records, times, strict=True):
        read, encoder, decode = (1e3 * statistics.median(column) for column in zip(*measured, strict=True))
        whole = read + NEW_TOKENS * decode
        record |= {"prefill_ms": read, "encoder_ms": encoder, "decode_ms": decode, "end_to_end_ms": whole}
        record |= {"encoder_share": encoder / whole, "repetitions": len(measured)}
    return records


def _time(
    model: Any, method: Method, prompt: Prompt, ratio: float | None
) -> tuple[Prefill, tuple[float, float, float]]:
    """Seconds to read, of the encoder, and per decoded token."""
    with CallTimer(model.base_model.semantic_encoder) as timer:
        read, prefill = timed(lambda: method.read(model, prompt, prompt.budget(ratio or 1.0)))
    decode, ids = timed(lambda: decode_greedily(model, prefill, TIMED_TOKENS + 1, lambda ids: False))
    prefill.cache.crop(1 - len(ids))
    # The first token needs no step of the model.
    return prefill, (read, timer.seconds, decode / TIMED_TOKENS)
