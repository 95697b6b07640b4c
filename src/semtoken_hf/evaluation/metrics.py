"""From lines of results to the figures of the report: one record per cell, speed, long contexts, and the alarms."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .alarms import find_alarms
from .cells import Cell, list_cells, title_of
from .configuration import EvaluationConfig, chosen
from .files import write_text
from .jobs import read_records
from .methods import press_methods
from .provenance import provenance
from .tasks import TASKS

Records = dict[str, dict[str, Any]]


def collect(config: EvaluationConfig, speed: list[dict[str, Any]], long: list[dict[str, Any]]) -> dict[str, Any]:
    """All figures of an evaluation, written to `metrics.json` in its folder.

    Returns:
        `config`, `provenance`, `cells` (see `summarise`), `speed` and `long_contexts` as measured, and `alarms`.
    """
    cells, folder = [], config.folder
    references = {
        task: [by_id(Cell(task, method, None).path(folder)) for method in ("full", "none")]
        for task in chosen(config.tasks, TASKS)
    }
    for cell in [*list_cells(config), *list_press_cells(config)]:
        if records := by_id(cell.path(folder)):
            has_rival = cell.ratio is not None and cell.method != "truncation"
            cut = by_id(Cell(cell.task, "truncation", cell.ratio).path(folder)) if has_rival else {}
            full, none = references[cell.task]
            cells.append(summarise(cell, records, full, none, cut))
    metrics = {
        "config": asdict(config),
        "provenance": provenance() | press_provenance(folder),
        "cells": cells,
        "speed": speed,
        "long_contexts": long,
        "alarms": find_alarms(cells, speed),
    }
    write_text(folder / "metrics.json", json.dumps(metrics, indent=1, ensure_ascii=False) + "\n")
    return metrics


def list_press_cells(config: EvaluationConfig) -> list[Cell]:
    """The cells that `scripts/kvpress_baselines.sh` may have filled."""
    return [
        Cell(task, method, ratio)
        for task in chosen(config.tasks, TASKS)
        for method in press_methods()
        for ratio in config.ratios_of(task)
    ]


def press_provenance(folder: Path) -> dict[str, str]:
    """The versions that the presses ran with, if they ran."""
    file = folder / "kvpress" / "environment.json"
    if not file.exists():
        return {}
    versions = json.loads(file.read_text(encoding="utf-8"))
    return {"versions for kvpress": ", ".join(f"{name} {number}" for name, number in versions.items())}


def by_id(path: Path) -> Records:
    return {record["id"]: record for record in read_records(path)}


def summarise(cell: Cell, records: Records, full: Records, none: Records, cut: Records | None = None) -> dict[str, Any]:
    """The figures of one cell, beside the full context, none and truncation (`cut`) on the same examples.

    Returns:
        examples: how many.
        tokens_per_slot: of whole prompts.
        kv_bytes, kv_share: of the cache behind the prompt, mean, and against the full context.
        nll: nats per scored token; perplexity where the task is one.
        cost: exp(nll - nll of the full context) - 1, the rise in perplexity of what is scored.
        spread: standard error of that, by the paired differences over examples.
        ahead, ahead_spread: nats per scored token below truncation at the same ratio, and the standard error of that.
        gain_kept: share of the full context's benefit over none: of perplexity, or of likelihood for answers.
        score, score_lost: of the generated answers, 0 to 100, and points below the full context.
        answer_kept: share of the gold answer's tokens in the context that have a slot of their own.
        question_kept: whether that holds for every token of every question.
        round_trip: whether decoding the ids gives back every text.
        groups: the same for every group of examples, if there are several.
    """
    task, cut = TASKS[cell.task], cut or {}
    figures = {
        "task": cell.task,
        "task_title": task.title,
        "metric": task.metric,
        "is_perplexity": task.is_perplexity,
        "method": cell.method,
        "checkpoint": cell.checkpoint,
        "ablation": cell.ablation,
        "title": title_of(cell),
        "ratio": cell.ratio,
        **_figures(task.is_perplexity, records, full, none, cut),
    }
    names = sorted({r["group"] for r in records.values()})
    if len(names) > 1:
        groups = {}
        for name in names:
            part = {key: r for key, r in records.items() if r["group"] == name}
            groups[name] = _figures(task.is_perplexity, part, full, none, cut)
        figures["groups"] = groups
    return figures


def _figures(is_perplexity: bool, records: Records, full: Records, none: Records, cut: Records) -> dict[str, Any]:
    rows = list(records.values())
    tokens, slots = (sum(r[name] for r in rows) for name in ("tokens", "slots"))
    figures: dict[str, Any] = {
        "examples": len(rows),
        "tokens_per_slot": tokens / slots,
        "kv_bytes": _mean(rows, "kv_bytes"),
        "nll": _nll(rows),
        "score": _mean(rows, "score"),
        "answer_kept": _mean(rows, "answer_kept"),
        "question_kept": _all(rows, "question_kept"),
        "round_trip": _all(rows, "round_trip"),
    }
    if is_perplexity:
        figures["perplexity"] = math.exp(figures["nll"])
    if all(key in cut for key in records):
        others = [cut[key] for key in records]
        figures["ahead"] = _nll(others) - figures["nll"]
        if len(rows) > 1:
            figures["ahead_spread"] = _standard_error(rows, others)
    if not all(key in full for key in records):
        return figures
    whole = [full[key] for key in records]
    figures["kv_share"] = figures["kv_bytes"] / _mean(whole, "kv_bytes")
    figures["cost"] = math.exp(figures["nll"] - _nll(whole)) - 1
    if len(rows) > 1:
        figures["spread"] = math.exp(_standard_error(rows, whole)) - 1
    if figures["score"] is not None:
        figures["score_lost"] = _mean(whole, "score") - figures["score"]
    if all(key in none for key in records):
        scale: Callable[[float], float] = math.exp if is_perplexity else float
        worst, best = scale(_nll([none[key] for key in records])), scale(_nll(whole))
        figures["gain_kept"] = (worst - scale(figures["nll"])) / (worst - best) if worst != best else None
    return figures


def _nll(rows: list[dict[str, Any]]) -> float:
    """Nats per scored token."""
    scored = [r for r in rows if "nll" in r]
    return sum(r["nll"] for r in scored) / sum(r["scored"] for r in scored)


def _standard_error(rows: list[dict[str, Any]], whole: list[dict[str, Any]]) -> float:
    """Of the difference in nats per token over examples of any length: that of a ratio of two means."""
    paired = [(r["nll"] - w["nll"], r["scored"]) for r, w in zip(rows, whole, strict=True) if "nll" in r]
    mean = sum(d for d, _ in paired) / sum(n for _, n in paired)
    deviation = statistics.stdev(d - mean * n for d, n in paired) if len(paired) > 1 else math.nan
    return deviation / len(paired) ** 0.5 / statistics.fmean(n for _, n in paired)


def _mean(rows: list[dict[str, Any]], name: str) -> Any:
    """Mean over the examples that have the figure; None if none has it."""
    values = [r[name] for r in rows if name in r]
    return statistics.fmean(values) if values else None


def _all(rows: list[dict[str, Any]], name: str) -> bool | None:
    """Whether it holds for all examples that say so; None if none does."""
    values = [r[name] for r in rows if name in r]
    return all(values) if values else None
