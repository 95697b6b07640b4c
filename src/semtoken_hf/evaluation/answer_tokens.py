"""How often the answer to a question keeps slots of its own: planning alone, the language model is not read."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from ..standalone_planner import SpanPlanner
from ..token_layout import TokenLayout
from .prompts import Prompt


class KnownFingerprints:
    """An encoder that has read its prompt already."""

    def __init__(self, fingerprints: Tensor):
        self.fingerprints = fingerprints

    def count_windows(self, layout: TokenLayout) -> Tensor:
        return layout.lengths.new_zeros(())

    def __call__(self, input_ids: Tensor, layout: TokenLayout, windows: int | None = None) -> Tensor:
        return self.fingerprints


def shares_kept(
    planner: SpanPlanner,
    prompts: list[Prompt],
    plans: Sequence[tuple[str, dict[str, Any], bool]],
    ratios: Sequence[float],
) -> dict[tuple[str, float], tuple[float, float, float]]:
    """What stays whole of the answers, and of everything.

    Args:
        planner: with the encoder.
        prompts: with their answer marked.
        plans: title, fields of the configuration, and whether the question is marked or the protected tail has to do.
        ratios: tokens per slot.

    Returns:
        By title and ratio, means over the prompts: share of the answer's tokens and of the context's with a slot of
        their own, and tokens per slot.
    """
    found: dict[tuple[str, float], list[tuple[float, float, float]]] = {}
    for prompt in tqdm(prompts, desc="plan", leave=False):
        question = prompt.question[None]
        fingerprints = planner.plan(prompt.ids[None]).fingerprints
        assert fingerprints is not None
        # One prompt is one stretch, whatever is protected: the encoder sees the same every time.
        known: Any = KnownFingerprints(fingerprints)
        for title, fields, marked in plans:
            config = copy.deepcopy(planner.config)
            for name, value in fields.items():
                setattr(config, name, value)
            marks = {"protected_mask": question, "query_mask": question} if marked else {}
            for ratio in ratios:
                plan = SpanPlanner(config, known).plan(prompt.ids[None], target_ratio=ratio, **marks)
                whole = (plan.spans.lengths[plan.spans.index] == 1).float()
                shares = float(whole[prompt.answer].mean()), float(whole[~prompt.question].mean())
                found.setdefault((title, ratio), []).append((*shares, prompt.length / int(plan.kept_lengths)))
    return {key: tuple(map(statistics.fmean, zip(*rows, strict=True))) for key, rows in found.items()}  # type: ignore[misc]


__all__ = ["KnownFingerprints", "shares_kept"]
