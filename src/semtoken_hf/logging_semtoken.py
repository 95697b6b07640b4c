"""What the package logs: loggers that obey `transformers.logging.set_verbosity_*`, and calls that ran plain."""

from __future__ import annotations

from collections import Counter
from typing import Any

from transformers.utils.logging import get_logger as logger_of_transformers


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


__all__ = ["fallbacks", "get_logger", "warn_of_fallback"]
