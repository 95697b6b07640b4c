"""What the package logs: loggers that obey `transformers.logging.set_verbosity_*`, and the line after a prefill."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from transformers.utils.logging import get_logger as logger_of_transformers

from .cache_bytes import cache_bytes


def get_logger(name: str) -> Any:
    """A logger below Transformers' own: its level and its handler are those that users set."""
    return logger_of_transformers(f"transformers.{name}")


logger = get_logger(__name__)
# Calls of this process that ran the plain model although compression was asked for, by their reason.
fallbacks: Counter[str] = Counter()


def warn_of_fallback(reason: str) -> None:
    """Warn once of a reason for which calls run the plain model, and count every such call."""
    fallbacks[reason] += 1
    logger.warning_once(f"SemToken does not compress this call and runs the plain model exactly: {reason}")


def log_prefill(prompt: Any, cache: Any = None) -> None:
    """At level info: tokens, slots and bytes, and what the budget could not honour. Else nothing, without a wait.

    Args:
        prompt: the CompressedPrompt that was read.
        cache: that holds its slots by now; None: none, or pages that others own.
    """
    if not logger.isEnabledFor(logging.INFO):
        return
    tokens, slots = int(prompt.original_lengths.sum()), sum(prompt.slot_counts)
    held = f"; the KV cache takes {cache_bytes(cache):,} bytes" if hasattr(cache, "layers") else ""
    plain = f"; {fallbacks.total():,} calls before it ran plain, as their warnings say" if fallbacks else ""
    ratio = f"{tokens / max(slots, 1):.2f} per slot"
    logger.info(f"SemToken read {tokens:,} tokens in {slots:,} slots ({ratio}){held}{plain}.")
    for row, (kept, budget) in enumerate(zip(prompt.slot_counts, prompt.budgets.tolist(), strict=True)):
        if kept > budget:
            logger.info(
                f"Row {row} keeps {kept:,} slots of a budget of {budget:,}: its protected tokens and "
                "`max_span_length` forbid fewer."
            )


__all__ = ["fallbacks", "get_logger", "log_prefill", "warn_of_fallback"]
