#!/usr/bin/env python
"""Write the tables of quality in the documents from one `metrics.json`, that of the reference model's card.

    python scripts/quality_tables.py

A table stands between `<!-- quality: ROWS -->` and `<!-- end of quality -->`; ROWS are methods of the evaluation, with
`.NAME` behind them for a further checkpoint, and `against_truncation`. `<!-- quality of TASKS: ROWS -->` has columns
for these tasks alone.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from semtoken_hf.evaluation.files import write_text

ROOT = Path(__file__).resolve().parents[1]
METRICS = ROOT / "model_cards" / "smollm2-135m-instruct" / "metrics.json"
DOCUMENTS = ("README.md", "docs/evaluating.md", "docs/choosing.md")
TABLE = re.compile(r"(<!-- quality(?: of ([\w ]+))?: ([\w. ]+) -->\n).*?(<!-- end of quality -->)", re.DOTALL)
RATIOS = (2.4, 4.0, 8.0)
TITLES = {
    "truncation": "truncation (first + last)",
    "semtoken": "**SemToken**",
    "semtoken.static": "SemToken, static encoder",
    "semtoken.adapted": "SemToken, adapted",
    "semtoken_paper": "the paper's spans and budget",
    "random": "random dropping",
    "kvpress_SnapKV": "SnapKV",
    "kvpress_TOVA": "TOVA",
    "kvpress_KVzip": "KVzip",
}
SHORT = {
    "LongBench, English and code": "LongBench",
    "WikiTableQuestions": "tables",
    "key-value retrieval": "keys",
    "needle in a haystack": "needle",
}


def find(cells: list[dict[str, Any]], task: str, row: str, ratio: float) -> dict[str, Any]:
    """The cell of a task, a method with its checkpoint, and a ratio; empty where nothing was measured."""
    method, _, checkpoint = row.partition(".")
    wanted = (task, method, checkpoint or None, ratio, None)
    names = ("task", "method", "checkpoint", "ratio", "ablation")
    return next((c for c in cells if tuple(c[name] for name in names) == wanted), {})


def gains(cells: list[dict[str, Any]], task: str, row: str) -> str:
    """Shares of the gain, in per cent, at the ratios up to the last one that was measured."""
    kept = [find(cells, task, row, ratio).get("gain_kept") for ratio in RATIOS]
    while kept and kept[-1] is None:
        kept.pop()
    return " / ".join("-" if k is None else str(round(100 * k)) for k in kept) + " %" * bool(kept)


def ahead(cells: list[dict[str, Any]], task: str) -> str:
    """Nats by which SemToken is ahead of truncation at the first ratio."""
    cell = find(cells, task, "semtoken", RATIOS[0])
    return f"{cell['ahead']:+.2f} ± {cell['ahead_spread']:.2f}"


def table(cells: list[dict[str, Any]], tasks: list[str], rows: list[str]) -> str:
    """A table of `rows`, a column for each of `tasks`, or for each that SemToken was measured on."""
    tasks = tasks or list(dict.fromkeys(c["task"] for c in cells if c["method"] == "semtoken"))
    heads = [find(cells, task, "semtoken", RATIOS[0]) for task in tasks]
    titles = [f"{SHORT.get(h['task_title'], h['task_title'])} ({h['examples']})" for h in heads]
    lines = [f"| gain kept at 2.4 / 4 / 8x | {' | '.join(titles)} |", "|---" * (len(tasks) + 1) + "|"]
    for row in rows:
        if row == "against_truncation":
            title, entries = "nats ahead of truncation at 2.4", [ahead(cells, task) for task in tasks]
        else:
            title, entries = TITLES[row], [gains(cells, task, row) for task in tasks]
        lines.append(f"| {title} | {' | '.join(entries)} |")
    return "\n".join(lines) + "\n"


def filled(text: str, cells: list[dict[str, Any]]) -> str:
    """A document with its tables as the figures say."""

    def written(found: re.Match[str]) -> str:
        opening, tasks, rows, ending = found.groups()
        return opening + table(cells, (tasks or "").split(), rows.split()) + ending

    return TABLE.sub(written, text)


def main() -> None:
    cells = json.loads(METRICS.read_text(encoding="utf-8"))["cells"]
    for name in DOCUMENTS:
        write_text(ROOT / name, filled((ROOT / name).read_text(encoding="utf-8"), cells))


if __name__ == "__main__":
    main()
