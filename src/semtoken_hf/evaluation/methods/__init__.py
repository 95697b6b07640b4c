"""The registry of methods: every way to read a prompt within a number of slots.

The presses of kvpress prune a plain model's cache after a full prefill and live in an environment of their own
(`scripts/kvpress_baselines.sh`); here they are names and titles.
"""

from __future__ import annotations

from ..relevance import RELEVANCES
from .base import Method
from .compressed import Compressed
from .selection import FullContext, NoContext, RandomDropping, SelfInformation, Truncation

METHODS: dict[str, Method] = {
    "full": FullContext("full context", has_budget=False),
    "none": NoContext("no context (protected tokens only)", has_budget=False),
    "truncation": Truncation("truncation (first + last)"),
    "random": RandomDropping("random dropping"),
    "self_information": SelfInformation("self-information pruning"),
    "uniform": Compressed("uniform spans (no encoder)", fields={"segmentation_mode": "uniform"}),
    "semtoken": Compressed("SemToken"),
    "semtoken_representative": Compressed(
        "SemToken, representative, not adapted",
        fields={"merge_mode": "representative", "merger_base": "representative"},
    ),
    "semtoken_mean": Compressed("SemToken, mean, not adapted", fields={"merge_mode": "mean", "merger_base": "mean"}),
    "semtoken_learned": Compressed("SemToken, learned", fields={"merge_mode": "learned"}),
    "semtoken_marked": Compressed("SemToken, the question marked", marks_question=True),
    **{f"semtoken_{part}": Compressed(f"SemToken, relevance from {part} alone", relevance=part) for part in RELEVANCES},
    "semtoken_unasked": Compressed("SemToken, no question looked for", fields={"query_weight": 0.0}),
    "semtoken_paper": Compressed(
        "SemToken, the paper's spans and budget", fields={"segmentation_mode": "greedy", "max_span_length": 8}
    ),
    "semtoken_boundary": Compressed("SemToken, boundary spans", fields={"segmentation_mode": "boundary"}),
    "semtoken_compact": Compressed("SemToken, compact positions", fields={"position_mode": "compact"}),
    "semtoken_original": Compressed("SemToken, original positions", fields={"position_mode": "original"}),
}

PRESSES: dict[str, str] = {
    "StreamingLLM": "StreamingLLMPress",
    "Knorm": "KnormPress",
    "SnapKV": "SnapKVPress",
    "ExpectedAttention": "ExpectedAttentionPress",
    "TOVA": "TOVAPress",
    "KeyDiff": "KeyDiffPress",
    "KVzip": "KVzipPress",
}
# Presses that read the ids of the context again, so that they cannot follow a context of slots.
REPLAYING = ("KVzip",)


def press_methods() -> dict[str, str]:
    """Titles of the methods that kvpress runs: every press alone, and behind SemToken."""
    alone = {f"kvpress_{name}": f"{name} (kvpress)" for name in PRESSES}
    return alone | {f"semtoken_{name}": f"SemToken, then {name}" for name in PRESSES if name not in REPLAYING}


__all__ = ["METHODS", "PRESSES", "REPLAYING", "Compressed", "Method", "press_methods"]
