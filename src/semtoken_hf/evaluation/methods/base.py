"""What a method is: a way to read a prompt within a number of slots."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from ..continuation import Prefill
from ..prompts import Prompt


@dataclass
class Method(ABC):
    """A way to read a prompt; all are compared at the same number of slots, so at equal bytes of KV cache.

    Attributes:
        title: for tables and plots.
        has_budget: False where the number of slots does not follow the ratio (full, none).
    """

    title: str
    has_budget: bool = True

    def unfit(self, model: Any) -> str | None:
        """Why this checkpoint cannot be read in this way, or None."""
        return None

    @abstractmethod
    def read(self, model: Any, prompt: Prompt, slots: int) -> Prefill:
        """Read `prompt` so that the cache holds at most `slots` positions, as far as the question leaves room."""


__all__ = ["Method"]
