"""What the report compares: the ways to read a prompt, their cells at a ratio, and quality against memory and time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..methods import METHODS, press_methods

Figures = dict[str, Any]
Point = tuple[float, float]

REFERENCES, BASELINES = ("full", "none"), ("truncation", "random", "uniform", "self_information")
FAMILIES = (
    "references",
    "cheap baselines",
    "kvpress",
    "SemToken",
    "SemToken, then a press",
    "further checkpoints",
    "others",
)
# A context helps in a task if reading none costs more than so many standard errors.
CLEAR = 2.0


@dataclass(frozen=True)
class Variant:
    """A method, or SemToken with a further checkpoint: a row of the tables, a line of the plots."""

    method: str
    checkpoint: str | None
    title: str

    @property
    def family(self) -> str:
        if self.checkpoint:
            return "further checkpoints"
        if self.method in REFERENCES:
            return "references"
        if self.method in BASELINES:
            return "cheap baselines"
        if self.method in press_methods():
            return "kvpress" if self.method.startswith("kvpress_") else "SemToken, then a press"
        return "SemToken" if self.method.startswith("semtoken") else "others"

    @property
    def is_reference(self) -> bool:
        return self.family == "references"


@dataclass(frozen=True)
class Series:
    """Points of one variant, in the order of x."""

    variant: Variant
    points: list[Point]


def finite(value: Any) -> float | None:
    """`value` if it is a finite number, else None."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def variant_of(figures: Figures) -> Variant:
    return Variant(figures["method"], figures.get("checkpoint"), figures["title"])


def variants_of(cells: Iterable[Figures]) -> list[Variant]:
    """Every variant among the cells, family by family, in the order of the registries."""
    order = [*REFERENCES, *BASELINES, *METHODS, *press_methods()]

    def rank(variant: Variant) -> tuple[int, int, str]:
        place = order.index(variant.method) if variant.method in order else len(order)
        return FAMILIES.index(variant.family), place, variant.checkpoint or ""

    return sorted({variant_of(cell) for cell in cells}, key=rank)


def methods_only(metrics: Figures) -> list[Figures]:
    """The cells without the ablations."""
    return [cell for cell in metrics["cells"] if not cell.get("ablation")]


def at_ratio(cells: list[Figures], ratio: float | None) -> list[Figures]:
    """The cells at a ratio, and those of methods without one."""
    return [cell for cell in cells if cell["ratio"] is None or cell["ratio"] == ratio]


def ratios_of(metrics: Figures) -> list[float | None]:
    """The configuration's ratios that were measured, else all that were; [None] where nothing has a ratio."""
    measured = {cell["ratio"] for cell in methods_only(metrics)} - {None}
    wanted: list[float | None] = [r for r in metrics["config"].get("ratios", []) if r in measured]
    return wanted or sorted(measured) or [None]


def tasks_of(cells: list[Figures]) -> list[str]:
    """Names of the tasks, texts before answers."""
    names = dict.fromkeys(cell["task"] for cell in cells)
    texts = {cell["task"] for cell in cells if cell["is_perplexity"]}
    return sorted(names, key=lambda name: name not in texts)


def title_of_task(cells: list[Figures], task: str) -> str:
    return next(c["task_title"] for c in cells if c["task"] == task)


def cost_against(cells: list[Figures], task: str, x_name: str) -> list[Series]:
    """The cost in a task against another figure, over all ratios."""
    return _series([(variant_of(c), c.get(x_name), c.get("cost")) for c in cells if c["task"] == task])


def cost_against_speed(cells: list[Figures], speed: list[Figures], task: str, length: int, x_name: str) -> list[Series]:
    """The cost in a task against a time measured at a prompt length, where both are known."""
    costs = {(c["method"], c.get("checkpoint"), c["ratio"]): c.get("cost") for c in cells if c["task"] == task}
    rows = [r for r in speed if r["length"] == length]
    return _series(
        [(variant_of(r), r[x_name], costs.get((r["method"], r.get("checkpoint"), r["ratio"]))) for r in rows]
    )


def gain_against_memory(cells: list[Figures]) -> tuple[list[Series], list[str], list[str]]:
    """Mean gain kept over the answer tasks against mean share of KV bytes; the references have all of it or none.

    Returns:
        The series; titles of the tasks meant over; titles of the variants left out, which lack some of them.
    """
    names = [t for t in tasks_of(cells) if context_helps([c for c in cells if c["task"] == t])]
    answers = [c for c in cells if not c["is_perplexity"] and not variant_of(c).is_reference]
    chosen = [c for c in answers if c["task"] in names]
    found: dict[tuple[Variant, float | None], list[Point]] = {}
    for cell in chosen:
        share, gain = finite(cell.get("kv_share")), finite(cell.get("gain_kept"))
        if share is not None and gain is not None:
            found.setdefault((variant_of(cell), cell["ratio"]), []).append((share, gain))
    complete = {key: points for key, points in found.items() if len(points) == len(names)}
    means = [
        (variant, statistics.fmean(share for share, _ in p), statistics.fmean(gain for _, gain in p))
        for (variant, _), p in complete.items()
    ]
    shown = {variant for variant, _ in complete}
    titles = list(dict.fromkeys(c["task_title"] for c in chosen))
    return _series(means), titles, [w.title for w in variants_of(answers) if w not in shown]


def context_helps(cells: list[Figures]) -> bool:
    """Whether a task is one of answers in which the full context is clearly better than none.

    Elsewhere the share of that gain is a ratio of two chance figures.
    """
    none = next((c for c in cells if c["method"] == "none"), None)
    if none is None or none["is_perplexity"] or finite(none.get("cost")) is None:
        return False
    return math.log1p(none["cost"]) > CLEAR * math.log1p(finite(none.get("spread")) or 0.0)


def pareto_front(points: list[Point], higher_is_better: bool = False) -> list[Point]:
    """The points that no other beats in both figures, by x; less x is better."""
    sign = -1 if higher_is_better else 1
    front: list[Point] = []
    for x, y in sorted(set(points), key=lambda p: (p[0], sign * p[1])):
        if not front or sign * y < sign * front[-1][1]:
            front.append((x, y))
    return front


def _series(rows: list[tuple[Variant, Any, Any]]) -> list[Series]:
    points: dict[Variant, list[Point]] = {}
    for variant, x, y in rows:
        if finite(x) is not None and finite(y) is not None:
            points.setdefault(variant, []).append((x, y))
    variants = variants_of({"method": w.method, "checkpoint": w.checkpoint, "title": w.title} for w in points)
    return [Series(variant, sorted(points[variant])) for variant in variants]
