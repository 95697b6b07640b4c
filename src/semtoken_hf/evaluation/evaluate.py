"""The whole evaluation of a SemToken checkpoint: quality, memory and time beside its baselines, and the ablations.

`semtoken evaluate` on the command line. A killed run goes on where it was when it is started again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .cells import Cell, list_cells, run_cells, why_not
from .configuration import EvaluationConfig
from .files import only_run_in, write_text
from .long_context import measure_long_contexts
from .metrics import collect
from .report import write_report
from .speed import measure_speed


def evaluate(config: EvaluationConfig) -> Path:
    """Measure what is missing, then write `metrics.json` and the report; returns the folder of the results.

    Raises:
        ValueError: nothing can be measured: no task has data; or another run writes into the same folder.
    """
    if not config.report:
        with only_run_in(config.folder, "evaluation"):
            measure(config)
    elif not list((config.folder / "cells").glob("*/*.jsonl")):
        raise ValueError(f"nothing is measured yet in {config.folder}: run the same command without --report")
    measured = {name: read_measured(config, name)["records"] for name in ("speed", "long_contexts")}
    write_report(collect(config, measured["speed"], measured["long_contexts"]), config.folder)
    return config.folder


def measure(config: EvaluationConfig) -> None:
    """Measure what is missing in the configuration's folder."""
    config.save()
    run_cells(config, cells_with_data(config))
    if config.settings("needle", 0).haystack and config.lengths:
        measure_once(config, "long_contexts", measure_long_contexts)
        measure_once(config, "speed", measure_speed)


def cells_with_data(config: EvaluationConfig) -> list[Cell]:
    """The cells that can be run; says which cannot, and why.

    Raises:
        ValueError: there are none.
    """
    reasons = {cell: why_not(config, cell) for cell in list_cells(config)}
    # Once for all ratios.
    for line in dict.fromkeys(f"left out of {cell.task}: {reason}" for cell, reason in reasons.items() if reason):
        print(line)
    cells = [cell for cell, reason in reasons.items() if reason is None]
    if not cells:
        raise ValueError("nothing to evaluate: no task has data. Pass --data-dir, or --sources TASK=FILE_OR_HUB_ID")
    return cells


def measure_once(config: EvaluationConfig, name: str, find: Callable[[EvaluationConfig], list[dict[str, Any]]]) -> None:
    """Write what `find` measures to `NAME.json`, unless it is there for the same lengths, ratios and methods."""
    asked = {key: getattr(config, key) for key in ("lengths", "ratios", "curve_ratios", "methods", "checkpoints")}
    known = read_measured(config, name)
    if any(known.get(key) != value for key, value in asked.items()):
        text = json.dumps({**asked, "records": find(config)}, indent=1)
        write_text(config.folder / f"{name}.json", text + "\n")


def read_measured(config: EvaluationConfig, name: str) -> dict[str, Any]:
    """`NAME.json` of the folder; no records if there is none."""
    path = config.folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"records": []}
