"""Context-compressed perplexity: the context is compressed, the targets are scored whole and never seen by the planner.

A window is `context_length` + `target_length` tokens opened by BOS. The reference points read the same windows with the
plain model: the full context, only the tokens that are protected anyway, the context truncated to as many tokens as
there were slots, and as many tokens chosen at random.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

Reader = Callable[[Any, Tensor], tuple[Tensor, Tensor]]


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


def make_windows(ids: Tensor, context_length: int, target_length: int, bos_id: int, limit: int) -> Tensor:
    """Consecutive windows int64 [W, context_length + target_length] of a text, each opened by BOS; at most `limit`.

    Raises:
        ValueError: the text is shorter than one window.
    """
    length = context_length + target_length
    windows = ids[: len(ids) // length * length].view(-1, length)[:limit].clone()
    if not len(windows):
        raise ValueError(f"the text has {len(ids)} tokens, one window needs {length}")
    windows[:, 0] = bos_id
    return windows


def read_compressed(context_length: int, **call: Any) -> Reader:
    """The model's own compression of the context; `call` goes to `forward` (`target_ratio`, ...)."""

    def read(model: Any, window: Tensor) -> tuple[Tensor, Tensor]:
        labels = window.clone()
        labels[:, :context_length] = -100
        outputs = model(input_ids=window, labels=labels, use_cache=False, **call)
        # The plain model answers where nothing merged.
        span_ids = outputs.get("span_ids")
        kept = torch.full((len(window),), context_length) if span_ids is None else span_ids[:, context_length - 1] + 1
        return outputs.loss, kept

    return read


def read_subset(context_length: int, choose: Callable[[int], Tensor]) -> Reader:
    """The plain model over chosen context tokens at their own positions; `choose` gives their indices int64 [m]."""

    def read(model: Any, window: Tensor) -> tuple[Tensor, Tensor]:
        chosen = choose(context_length)
        positions = torch.cat([chosen, torch.arange(context_length, window.shape[1])])[None]
        logits = model(
            input_ids=window[:, positions[0]],
            position_ids=positions,
            # Explicit: without a mask, gapped positions would be read as packed sequences.
            attention_mask=torch.ones_like(positions),
            compression=False,
            use_cache=False,
        ).logits[:, len(chosen) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), window[:, context_length:].flatten())
        return loss, torch.tensor([len(chosen)])

    return read


def keep_ends(first: int, last: int) -> Callable[[int], Tensor]:
    """The first and the last tokens of the context."""
    return lambda n: torch.cat([torch.arange(min(first, n)), torch.arange(max(n - last, first), n)])


def keep_random(kept: int, first: int, last: int, seed: int) -> Callable[[int], Tensor]:
    """`kept` tokens: the ends that are protected anyway, the others at random."""
    generator = torch.Generator().manual_seed(seed)

    def choose(n: int) -> Tensor:
        free = torch.randperm(n - first - last, generator=generator)[: kept - first - last] + first
        return torch.cat([torch.arange(first), free.sort().values, torch.arange(n - last, n)])

    return choose


@torch.no_grad()
def evaluate_reader(name: str, model: Any, windows: Tensor, read: Reader, context_length: int) -> PerplexityResult:
    """Perplexity of one way to read the context, window by window."""
    losses, slots = [], 0
    for window in tqdm(windows.split(1), desc=name, leave=False):
        loss, kept = read(model, window)
        losses.append(loss.double())
        slots += int(kept.sum())
    stacked = torch.stack(losses)
    return PerplexityResult(name, math.exp(stacked.mean()), len(windows) * context_length / slots, stacked)


def reference_readers(config: Any, context_length: int, kept: int) -> dict[str, Reader]:
    """Full context, none, truncation and random dropping at `kept` context slots.

    Raises:
        ValueError: the protected ends alone are more than `kept`.
    """
    first, last = config.keep_first, config.keep_last
    if kept < first + last:
        raise ValueError(f"{kept} slots cannot hold the {first} + {last} protected tokens: lower the ratio")
    return {
        "full context": read_subset(context_length, lambda n: torch.arange(n)),
        "no context (protected tokens only)": read_subset(context_length, keep_ends(first, last)),
        "truncation (first + last)": read_subset(context_length, keep_ends(first, kept - first)),
        "random dropping": read_subset(context_length, keep_random(kept, first, last, seed=0)),
    }


def evaluate_references(
    model: Any, windows: Tensor, context_length: int, ratios: list[float]
) -> dict[float, list[PerplexityResult]]:
    """`reference_readers` at every ratio; the first two, full context and none, are the same at each and read once."""
    once: list[PerplexityResult] = []
    results = {}
    for ratio in ratios:
        readers = list(reference_readers(model.config, context_length, math.ceil(context_length / ratio)).items())
        if not once:
            once = [evaluate_reader(name, model, windows, read, context_length) for name, read in readers[:2]]
        rest = [evaluate_reader(name, model, windows, read, context_length) for name, read in readers[2:]]
        results[ratio] = [*once, *rest]
    return results


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
