"""The suite's report: one JSON file and one Markdown file, whole at any moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..evaluation.files import write_text
from ..evaluation.provenance import provenance

# Of a part that is not over.
PENDING, RUNNING = "pending", "running"


class Report:
    """What is known so far; `save` after every change.

    Args:
        output: path of the JSON file; the Markdown file stands beside it.
    """

    def __init__(self, output: Path):
        self.output = output
        self.parts: dict[str, dict[str, Any]] = {}
        self.provenance: dict[str, str] = {}

    @classmethod
    def start(cls, output: Path, titles: dict[str, str]) -> Report:
        """A new report over parts of these names and titles."""
        report = cls(output)
        report.parts = {name: {"title": title, "status": PENDING} for name, title in titles.items()}
        report.provenance = provenance()
        report.save()
        return report

    @classmethod
    def load(cls, output: Path) -> Report:
        report = cls(output)
        content = json.loads(output.read_text(encoding="utf-8"))
        report.parts, report.provenance = content["parts"], content["provenance"]
        return report

    def update(self, name: str, **fields: Any) -> None:
        self.parts[name] |= fields
        self.save()

    def save(self) -> None:
        content = {"provenance": self.provenance, "passed": self.passed, "parts": self.parts}
        write_text(self.output, json.dumps(content, indent=1, default=str))
        write_text(self.output.with_suffix(".md"), self.markdown())

    @property
    def passed(self) -> bool:
        """Whether every check that was made held, and no part failed."""
        checks = [holds for part in self.parts.values() for holds in part.get("checks", {}).values()]
        return all(checks) and not any(part["status"] in ("failed", "killed") for part in self.parts.values())

    def next_pending(self) -> str | None:
        return next((name for name, part in self.parts.items() if part["status"] == PENDING), None)

    def running(self) -> str | None:
        return next((name for name, part in self.parts.items() if part["status"] == RUNNING), None)

    def markdown(self) -> str:
        lines = ["# GPU suite", "", "| part | status | checks that hold | seconds |", "|---|---|---|---|"]
        for part in self.parts.values():
            checks = part.get("checks", {})
            held = f"{sum(checks.values())} of {len(checks)}" if checks else ""
            status = part["status"] + (f": {part['reason']}" if part.get("reason") else "")
            lines.append(f"| {part['title']} | {_cell(status)} | {held} | {_cell(part.get('seconds'))} |")
        for part in self.parts.values():
            lines += _section(part)
        lines += ["", *(f"- {name}: `{value}`" for name, value in self.provenance.items()), ""]
        return "\n".join(lines)


def _section(part: dict[str, Any]) -> list[str]:
    lines = ["", f"## {part['title']}", ""]
    lines += [f"- does NOT hold: {name}" for name, holds in part.get("checks", {}).items() if not holds]
    lines += [f"- {note}" for note in part.get("notes", [])]
    # Rows of one kind share a table.
    tables: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in part.get("rows", []):
        tables.setdefault(tuple(row), []).append(row)
    for columns, rows in tables.items():
        lines += ["", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(_cell(value) for value in row.values()) + " |" for row in rows]
    if part.get("traceback"):
        lines += ["", "```", part["traceback"].strip(), "```"]
    return lines


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value).replace("|", "/").replace("\n", " ")
