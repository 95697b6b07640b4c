"""Prompts read with and without compression, alternating, through `pipeline("text-generation")`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..cache_semtoken import cache_bytes, is_semtoken_cache

# A text to go on with, or the messages of a chat.
Prompt = str | list[dict[str, str]]


@dataclass
class Reading:
    """How one variant, plain or SemToken, read the prompts; lists have an entry a prompt and repetition.

    Attributes:
        tokens: of the prompts.
        slots: positions that the layers saw.
        kv_bytes: keys and values after prefill.
        prefill_seconds, decode_seconds: to the first token, and per further token.
        encoder_seconds: the encoder's part of the prefill.
        answers: generated texts, one a prompt.
    """

    tokens: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    kv_bytes: list[int] = field(default_factory=list)
    prefill_seconds: list[float] = field(default_factory=list)
    decode_seconds: list[float] = field(default_factory=list)
    encoder_seconds: list[float] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)


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
    pipe: Any, prompts: list[Prompt], max_new_tokens: int, repetitions: int = 1, target_ratio: float | None = None
) -> dict[str, Reading]:
    """Let the plain model and SemToken answer every prompt in turn.

    Args:
        pipe: a text-generation pipeline over a SemToken checkpoint.
        prompts: texts, or chats for the checkpoint's chat template.
        max_new_tokens: tokens of an answer, at least 2.
        repetitions: of each prompt; the first prompt is read once before, to warm up.
        target_ratio: tokens per slot; None: the checkpoint's.

    Returns:
        `{"plain": ..., "SemToken": ...}`.
    """
    calls: dict[str, dict[str, Any]] = {"plain": {"compression": False}, "SemToken": {"target_ratio": target_ratio}}
    readings = {name: Reading() for name in calls}
    for call in calls.values():
        _ask(pipe, prompts[0], 2, call, Reading())
    for prompt in prompts:
        for repetition in range(repetitions):
            for name, call in calls.items():
                answer = _ask(pipe, prompt, max_new_tokens, call, readings[name])
                if repetition == 0:
                    readings[name].answers.append(answer)
    return readings


def _ask(pipe: Any, prompt: Prompt, max_new_tokens: int, call: dict[str, Any], into: Reading) -> str:
    """One prompt, greedily: its figures go `into` a reading; returns the answer."""
    inputs = tokenised(pipe.tokenizer, prompt).to(pipe.model.device)
    tokens = inputs["input_ids"].shape[1]
    options = {"do_sample": False, **call}
    with CallTimer(pipe.model.base_model.semantic_encoder) as timer:
        prefill, output = timed(
            lambda: pipe.model.generate(**inputs, **options, max_new_tokens=1, return_dict_in_generate=True)
        )
    cache = output.past_key_values
    whole, records = timed(lambda: pipe(prompt, max_new_tokens=max_new_tokens, return_tensors=True, **options))
    answer = records[0]["generated_token_ids"][tokens:]
    into.tokens.append(tokens)
    into.slots.append(int(cache.compressed_lengths.max()) if is_semtoken_cache(cache) else tokens)
    into.kv_bytes.append(cache_bytes(cache))
    into.prefill_seconds.append(prefill)
    into.encoder_seconds.append(timer.seconds)
    if len(answer) > 1:
        into.decode_seconds.append((whole - prefill) / (len(answer) - 1))
    return pipe.tokenizer.decode(answer, skip_special_tokens=True).strip()


def tokenised(tokenizer: Any, prompt: Prompt) -> Any:
    """`input_ids` and `attention_mask` of a text, or of a chat as a pipeline makes them."""
    if isinstance(prompt, str):
        return tokenizer(prompt, return_tensors="pt")
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def side_by_side_table(readings: dict[str, Reading]) -> str:
    """The readings as a Markdown table of medians, with the ratio plain / SemToken."""
    plain, ours = readings["plain"], readings["SemToken"]
    median = statistics.median

    def row(label: str, name: str, form: str, scale: float = 1) -> str:
        whole, short = (scale * median(getattr(reading, name)) for reading in (plain, ours))
        return f"| {label} | {whole:{form}} | {short:{form}} | {whole / short:.2f} x |"

    encoder_share = 100 * median(ours.encoder_seconds) / median(ours.prefill_seconds)
    return "\n".join(
        [
            "| | plain | SemToken | plain / SemToken |",
            "|---|---|---|---|",
            f"| prompt tokens | {median(plain.tokens):,.0f} | {median(ours.tokens):,.0f} | |",
            row("positions read (slots)", "slots", ",.0f"),
            row("KV cache, bytes", "kv_bytes", ",.0f"),
            row("prefill (to the first token), ms", "prefill_seconds", ",.0f", 1e3),
            row("decode, ms per token", "decode_seconds", ".1f", 1e3),
            f"| encoder's share of prefill | | {encoder_share:.1f} % | |",
        ]
    )
