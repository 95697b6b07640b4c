"""One prompt planned at several ratios with one pass of the encoder; of the checkpoint, nothing else is read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..compression import PromptOrigin, slot_positions
from ..configuration_semtoken import base_merge_mode
from ..span_merging import representative_tokens
from ..token_layout import TokenLayout
from ..tokenization_semtoken_fast import SpanPlanner
from .details import SpanDetails, describe

DEFAULT_RATIOS = (1.5, 2.0, 2.4, 3.0, 4.0, 6.0, 8.0)
# A bar is shown only where there is something to wait for, in seconds.
PATIENCE = 2.0


class KnownFingerprints:
    """An encoder that has read its prompt already."""

    def __init__(self, fingerprints: Tensor):
        self.fingerprints = fingerprints

    def count_windows(self, layout: TokenLayout) -> Tensor:
        return layout.lengths.new_zeros(())

    def __call__(self, input_ids: Tensor, layout: TokenLayout, windows: int | None = None) -> Tensor:
        return self.fingerprints


def default_ratios(config: Any) -> list[float | None]:
    """What is worth comparing: the checkpoint's own ratio among others, or None where it has no ratio."""
    if config.target_ratio is None:
        return [None]
    return [*sorted({*DEFAULT_RATIOS, float(config.target_ratio)})]


@torch.no_grad()
def plan_ratios(
    planner: SpanPlanner, inputs: dict[str, Tensor], ratios: Sequence[float | None] | None = None
) -> list[SpanDetails]:
    """The plans of one prompt, as `model.compress` would make them.

    Args:
        planner: of the checkpoint.
        inputs: `input_ids` int64 [1, T], and as far as they are given `protected_mask` and `query_mask` [1, T].
        ratios: tokens per slot, None for the configuration's; left out: `default_ratios`.

    Raises:
        ValueError: the prompt is empty, has more than one row, or a mask is not of its shape.
    """
    ids = inputs["input_ids"]
    if ids.ndim != 2 or len(ids) != 1 or not ids.numel():
        raise ValueError(f"one prompt of at least one token can be inspected, got the shape {tuple(ids.shape)}")
    config, reader = planner.config, planner
    masks: dict[str, Any] = {name: inputs[name] for name in ("protected_mask", "query_mask") if name in inputs}
    ratios = default_ratios(config) if ratios is None else ratios
    found = []
    for ratio in tqdm(ratios, desc="plan", leave=False, delay=PATIENCE):
        with _counting(reader.encoder):
            plan = reader.plan(ids, target_ratio=ratio, **masks)
        if plan.fingerprints is not None:
            known: Any = KnownFingerprints(plan.fingerprints)
            reader = SpanPlanner(config, known)
        represents = base_merge_mode(config) == "representative"
        anchors = representative_tokens(plan.fingerprints if represents else None, plan.spans)
        positions = slot_positions(plan, anchors, config.position_mode)
        found.append(describe(PromptOrigin(plan, config, ids, anchors, positions, {"target_ratio": ratio, **masks})))
    return found


@contextlib.contextmanager
def _counting(encoder: Any) -> Iterator[None]:
    """A bar over the encoder's calls while it reads."""
    layers = getattr(encoder, "encoder", None)
    if not isinstance(layers, torch.nn.Module):
        yield
        return
    with tqdm(desc="encode", unit=" calls", leave=False, delay=PATIENCE) as bar:
        handle = layers.register_forward_hook(lambda *_: bar.update() and None)
        try:
            yield
        finally:
            handle.remove()


__all__ = ["default_ratios", "plan_ratios"]
