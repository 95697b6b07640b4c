"""Ablations that the paper leaves open: one field of the configuration changed at a time."""

from __future__ import annotations

from typing import Any

from .methods import Compressed

# The paper's mode, as far as an ablation does not say otherwise.
PAPER = {"segmentation_mode": "greedy", "max_span_length": 8}


def _at_budget(label: str, **fields: Any) -> Compressed:
    return Compressed(label, fields={**PAPER, **fields})


def _by_threshold(label: str, **fields: Any) -> Compressed:
    """The paper's thresholds cut without a budget, so the ratio is what they give."""
    return Compressed(label, has_budget=False, fields={**PAPER, **fields})


ABLATIONS: dict[str, dict[str, Compressed]] = {
    "tau": {
        f"tau_{tau:g}": _by_threshold(f"tau = {tau:g}, no budget", similarity_threshold=tau)
        for tau in (0.80, 0.85, 0.90)
    },
    "tau_budget": {
        f"tau_{tau:g}_budget": _at_budget(f"tau <= {tau:g}, at the budget", similarity_threshold=tau)
        for tau in (0.80, 0.85, 0.90)
    },
    "delta": {
        f"delta_{delta:g}": _by_threshold(
            f"tau = 0.85, delta = {delta:g}, no budget", similarity_threshold=0.85, entropy_threshold=delta
        )
        for delta in (0.02, 0.05, 0.1, 0.2)
    },
    "segmentation": {
        f"segmentation_{mode}": _at_budget(f"{mode} spans", segmentation_mode=mode)
        for mode in ("greedy", "boundary", "uniform")
    },
    "span": {f"span_{cap}": _at_budget(f"spans of at most {cap}", max_span_length=cap) for cap in (4, 8, 16, 32)},
    "query": {
        f"query_{weight:g}": Compressed(f"query_weight = {weight:g}", fields={"query_weight": weight})
        for weight in (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
    },
    "radius": {f"radius_{k}": Compressed(f"k = {k}", fields={"fingerprint_radius": k}) for k in (0, 1, 2, 5)},
    "window": {
        f"window_{w}": _at_budget(f"encoder window {w}", encoder_window=w, encoder_overlap=w // 8)
        for w in (32, 64, 128, 256)
    },
}
# Only a transformer encoder reads windows.
NEEDS_TRANSFORMER = ("window",)
