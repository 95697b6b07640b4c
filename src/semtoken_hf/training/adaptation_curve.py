"""The evaluation curve of a run, as csv and png."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from ..conversion.staging import staged_file
from ..evaluation.files import write_text

COLUMNS = (
    *("step", "targets", "eval_cost", "eval_truncation_cost", "eval_kl", "eval_perplexity", "eval_full_perplexity"),
    "eval_uncompressed_drift",
)
LINES = (
    ("compressed", "eval_cost", "o"),
    ("truncated to as many slots", "eval_truncation_cost", ""),
    ("uncompressed (drift)", "eval_uncompressed_drift", "."),
)


def write_curve(history: list[dict[str, Any]], folder: Path) -> None:
    """Write `curve.csv` and `curve.png` of a Trainer's `log_history`; nothing where it was never evaluated."""
    records = [r for r in history if "eval_cost" in r]
    if not records:
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [c for c in (*COLUMNS, "flops") if any(c in r for r in records)]
    writer.writerow(columns)
    writer.writerows([[r.get(c, "") for c in columns] for r in records])
    write_text(folder / "curve.csv", text.getvalue())
    _plot(records, folder / "curve.png")


def read_curve(folder: Path) -> list[dict[str, float]]:
    """The rows of `folder/curve.csv`; an empty cell counts as 0."""
    with (folder / "curve.csv").open(encoding="utf-8", newline="") as handle:
        return [{name: float(value or 0) for name, value in row.items()} for row in csv.DictReader(handle)]


def _plot(records: list[dict[str, Any]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    seen = [r["targets"] for r in records]
    for name, key, marker in LINES:
        if any(key in r for r in records):
            axes.plot(seen, [100 * r.get(key, float("nan")) for r in records], marker=marker, label=name)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xlabel("targets seen")
    axes.set_ylabel("perplexity against the teacher, %")
    axes.legend()
    with staged_file(file) as staged:
        figure.savefig(staged, dpi=120, format="png")
