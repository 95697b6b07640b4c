"""The plots of a report; matplotlib is imported when they are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .ablation_plots import draw_ablations
from .blocks import Plot
from .figures import (
    Figures,
    Point,
    Series,
    cost_against,
    cost_against_speed,
    finite,
    gain_against_memory,
    methods_only,
    pareto_front,
    tasks_of,
    title_of_task,
)
from .plot_style import STYLE, as_plot, looks

# A point beyond this multiple of what no context costs would press the others together.
FARTHEST = 1.3
# Ticks of the KV share, %.
SHARES = [100, 67, 50, 40, 33, 25, 17, 12.5, 6, 3]
# Shares of gain outside are those of broken readings or of chance.
LEAST_GAIN, MOST_GAIN = -0.5, 1.5


def draw_plots(metrics: Figures) -> dict[str, list[Plot]]:
    """The plots by section: memory, time, ablations."""
    from matplotlib import rc_context

    cells, speed = methods_only(metrics), metrics.get("speed", [])
    texts = tasks_of([c for c in cells if c["is_perplexity"]])
    with rc_context(STYLE):
        memory = [_cost_by_memory(cells, task) for task in texts]
        time = [_cost_by_time(cells, speed, task, metrics["config"]) for task in texts]
        drawn: dict[str, list[Plot | None]] = {
            "memory": [*memory, _gain_by_memory(cells)],
            "time": [*time],
            "ablations": [*draw_ablations(metrics["cells"])],
        }
    return {section: [p for p in plots if p is not None] for section, plots in drawn.items()}


def _cost_by_memory(cells: list[Figures], task: str) -> Plot | None:
    series = cost_against(cells, task, "kv_share")
    if not _can_compare(series):
        return None
    title = f"{title_of_task(cells, task)}: rise in perplexity against KV bytes"
    limit = _cost_limit(cells, task)
    figure, axes = _subplots(1)
    _draw(axes[0], series, (None, limit))
    _label(axes[0], "KV cache, % of the full context's bytes", "rise in perplexity, %", SHARES)
    _legend(figure, axes)
    return as_plot(figure, f"cost_by_memory_{task}", title, _outside(series, (None, limit), "lower"))


def _gain_by_memory(cells: list[Figures]) -> Plot | None:
    series, tasks, left_out = gain_against_memory(cells)
    if not _can_compare(series):
        return None
    limits = (LEAST_GAIN, MOST_GAIN)
    figure, axes = _subplots(1)
    _draw(axes[0], series, limits, higher_is_better=True)
    _label(
        axes[0],
        "KV cache, % of the full context's bytes",
        "gain kept, mean of tasks, %",
        SHARES,
    )
    _legend(figure, axes)
    text = (
        "0 % is no context, 100 % the full one. Mean of the answer tasks in which the full context clearly beats none: "
        f"{', '.join(tasks)}. "
    )
    if left_out:
        text += f"Not measured in all of them, and left out: {', '.join(left_out)}. "
    return as_plot(
        figure, "gain_by_memory", "Answer tasks: gain kept against KV bytes", text + _outside(series, limits, "upper")
    )


def _cost_by_time(cells: list[Figures], speed: list[Figures], task: str, config: Figures) -> Plot | None:
    window = config.get("context_length", 0) + config.get("target_length", 0)
    length = min({r["length"] for r in speed}, key=lambda n: abs(n - window), default=0)
    reading, whole = (cost_against_speed(cells, speed, task, length, x) for x in ("prefill_ms", "end_to_end_ms"))
    if not _can_compare(reading):
        return None
    panels = [
        (reading, f"ms to read {length:,} tokens"),
        (whole, f"ms end to end, {length:,} tokens and 64 new ones"),
    ]
    limits = (None, _cost_limit(cells, task))
    figure, axes = _subplots(len(panels))
    for one, (series, label) in zip(axes, panels, strict=True):
        _draw(one, series, limits, [s.variant for s in reading])
        _label(one, label, "rise in perplexity, %" if one is axes[0] else "")
    _legend(figure, axes)
    title = f"{title_of_task(cells, task)}: rise in perplexity against time"
    return as_plot(figure, f"cost_by_time_{task}", title, _outside(reading, limits, "lower"))


def _can_compare(series: list[Series]) -> bool:
    return any(not s.variant.is_reference for s in series)


def _cost_limit(cells: list[Figures], task: str) -> float | None:
    none = next((finite(c.get("cost")) for c in cells if c["task"] == task and c["method"] == "none"), None)
    return FARTHEST * none if none is not None and none > 0 else None


def _subplots(panels: int) -> tuple[Any, Sequence[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.9), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False, sharey=True)[0]


def _draw(
    axes: Any,
    series: list[Series],
    limits: tuple[float | None, float | None],
    variants: list[Any] | None = None,
    higher_is_better: bool = False,
) -> None:
    """Every series and the Pareto front of all points, in percent; what is outside the limits is not drawn."""
    look = looks(list(dict.fromkeys([*(variants or []), *(s.variant for s in series)])))
    inside = [Series(s.variant, [p for p in s.points if _is_inside(p, limits)]) for s in series]
    front = pareto_front([p for s in inside for p in s.points], higher_is_better)
    x, y = ([p[i] for p in front] for i in (0, 1))
    axes.plot(
        *(x, [100 * v for v in y]),
        drawstyle="steps-post",
        color="#8a939c",
        alpha=0.4,
        linewidth=5,
        zorder=1,
        label="Pareto front",
    )
    for s in inside:
        if s.points:
            axes.plot([p[0] for p in s.points], [100 * p[1] for p in s.points], **look[s.variant])
    if not higher_is_better:
        axes.axhline(0, color="#7d868f", linewidth=0.9, zorder=2)
    axes.set_xscale("log")


def _is_inside(point: Point, limits: tuple[float | None, float | None]) -> bool:
    low, high = limits
    return (low is None or point[1] >= low) and (high is None or point[1] <= high)


def _label(axes: Any, x: str, y: str, shares: list[float] | None = None) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if shares:
        axes.xaxis.set_major_locator(FixedLocator([share / 100 for share in shares]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}"))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Any, axes: Sequence[Any]) -> None:
    """One legend for all panels, beside them."""
    entries: dict[str, Any] = {}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    front = entries.pop("Pareto front")
    figure.legend(
        [*entries.values(), front],
        [*entries, "Pareto front"],
        loc="outside right upper",
        handlelength=3,
        labelspacing=0.35,
    )


def _outside(series: list[Series], limits: tuple[float | None, float | None], where: str) -> str:
    """A sentence on what is not drawn."""
    better = f"Better is further to the {where} left."
    counts = {s.variant.title: sum(not _is_inside(p, limits) for p in s.points) for s in series}
    missing = [f"{title} ({count})" for title, count in counts.items() if count]
    return better if not missing else f"{better} Points beyond the plot: {', '.join(missing)}."
