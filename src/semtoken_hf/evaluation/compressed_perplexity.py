"""Context-compressed perplexity: the context is compressed, the targets are scored whole and never seen by the planner.

A window is `context_length` + `target_length` tokens opened by BOS. The reference points read the same windows with the
plain model: the full context, only the tokens that are protected anyway, the context truncated to as many tokens as
there are slots, and as many tokens chosen at random.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .continuation import score_target
from .methods import METHODS, Method
from .texts import window_prompt

REFERENCES = ("full", "none", "truncation", "random")


@dataclass
class PerplexityResult:
    """One method over all windows.

    Attributes:
        name: of the method.
        perplexity: exp of the mean loss (nats) per target token.
        ratio: context tokens per slot that the model read.
        losses: float64 [windows], mean loss of each window, for paired comparisons.
    """

    name: str
    perplexity: float
    ratio: float
    losses: Tensor


def evaluate_method(
    name: str, model: Any, windows: Tensor, method: Method, context_length: int, ratio: float
) -> PerplexityResult:
    """Perplexity of one way to read the context of windows int64 [W, context + target], window by window."""
    losses, slots = [], 0
    for number, window in enumerate(tqdm(windows, desc=name, leave=False)):
        prompt = window_prompt(number, window, context_length)
        prefill = method.read(model, prompt, prompt.budget(ratio))
        losses.append(score_target(model, prefill, prompt.target).mean())
        slots += prefill.slots
    stacked = torch.stack(losses)
    return PerplexityResult(name, math.exp(stacked.mean()), len(windows) * context_length / slots, stacked)


def evaluate_semtoken(name: str, model: Any, windows: Tensor, context_length: int, ratio: float) -> PerplexityResult:
    """Perplexity with the model's own compression of the context."""
    return evaluate_method(name, model, windows, METHODS["semtoken"], context_length, ratio)


def evaluate_references(
    model: Any, windows: Tensor, context_length: int, ratios: list[float]
) -> dict[float, list[PerplexityResult]]:
    """`REFERENCES` at every ratio; the first two, full context and none, are the same at each and read once."""

    def read(method: Method, ratio: float) -> PerplexityResult:
        return evaluate_method(method.title, model, windows, method, context_length, ratio)

    methods = [METHODS[name] for name in REFERENCES]
    once = [read(method, 1.0) for method in methods if not method.has_budget]
    return {ratio: [*once, *(read(m, ratio) for m in methods if m.has_budget)] for ratio in ratios}


def perplexity_table(results: list[PerplexityResult], full: PerplexityResult, none: PerplexityResult) -> list[str]:
    """Markdown lines: cost against `full`, its spread over windows, and the context gain kept.

    The spread is the standard error of the paired loss difference to the full context, in % of perplexity.
    """
    lines = [
        "| context read as | tokens per slot | perplexity | cost | spread | context gain kept |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        cost = 100 * (result.perplexity / full.perplexity - 1)
        difference = result.losses - full.losses
        spread = 100 * (difference.std() / len(difference) ** 0.5).exp() - 100 if len(difference) > 1 else float("nan")
        gain = context_gain_kept(result, full, none)
        lines.append(
            f"| {result.name} | {result.ratio:.2f} | {result.perplexity:.2f} | {cost:+.1f} % | {spread:.1f} % "
            f"| {100 * gain:.0f} % |"
        )
    return lines


def context_gain_kept(result: PerplexityResult, full: PerplexityResult, none: PerplexityResult) -> float:
    """(PPL_none - PPL) / (PPL_none - PPL_full): the share of the context's benefit that survives."""
    return (none.perplexity - result.perplexity) / (none.perplexity - full.perplexity)
