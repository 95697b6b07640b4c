"""The report of an evaluation: one HTML page, a Markdown section, plots, and the model index of a card."""

from __future__ import annotations

from .report import write_report

__all__ = ["write_report"]
