"""One small plot for every group of ablations; matplotlib is imported when they are drawn."""

from __future__ import annotations

import math
from typing import Any

from ..named_values import is_number
from .blocks import Plot
from .detail_tables import ablation_groups
from .figures import Figures, finite
from .plot_style import as_plot

# By checkpoint.
LOOKS = [
    {"color": colour, "marker": marker}
    for colour, marker in zip(("#3b82d6", "#e08214", "#a05fc0", "#2a9d5c", "#12a5b0"), "os^Dv", strict=True)
]
# Series lie beside each other, so that their bars do not cover one another.
STEP = 0.09


def draw_ablations(cells: list[Figures]) -> list[Plot]:
    """A plot for every group of every task, of those whose cost is known."""
    known = [c for c in cells if c.get("ablation") and finite(c.get("cost")) is not None]
    looks = {name: LOOKS[i % len(LOOKS)] for i, name in enumerate(dict.fromkeys(c.get("checkpoint") for c in known))}
    return [_draw_group(title, own, looks) for title, own in ablation_groups(known)]


def _draw_group(title: str, cells: list[Figures], looks: dict[str | None, dict[str, Any]]) -> Plot:
    from matplotlib.figure import Figure

    settings = list(dict.fromkeys(setting_of(c) for c in cells))
    checkpoints = list(dict.fromkeys(c.get("checkpoint") for c in cells))
    has_budget = all(c["ratio"] is not None for c in cells)
    figure = Figure(figsize=(4.4, 2.7 if has_budget else 3.6), layout="constrained")
    heights = [1] if has_budget else [1.5, 1]
    axes = figure.subplots(len(heights), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for i, checkpoint in enumerate(checkpoints):
        own = [c for c in cells if c.get("checkpoint") == checkpoint]
        x = [settings.index(setting_of(c)) + STEP * (i - (len(checkpoints) - 1) / 2) for c in own]
        look = {**looks[checkpoint], "markersize": 5, "linewidth": 1.2}
        # Names have no order to draw a line along.
        look["linestyle"] = "-" if all(map(is_number, settings)) else ""
        spreads = [100 * (finite(c.get("spread")) or 0.0) for c in own]
        label = checkpoint or "the checkpoint"
        axes[0].errorbar(x, [100 * c["cost"] for c in own], spreads, capsize=3, elinewidth=1.2, label=label, **look)
        if not has_budget:
            axes[1].plot(x, [finite(c["tokens_per_slot"]) or math.nan for c in own], **look)
    _finish(axes, settings, checkpoints != [None], has_budget)
    text = "" if has_budget else "Below: the ratio that the threshold gives."
    return as_plot(figure, f"ablation_{cells[0]['task']}_{cells[0]['ablation']}", title, text, small=True)


def _finish(axes: Any, settings: list[str], has_legend: bool, has_budget: bool) -> None:
    axes[0].axhline(0, color="#7d868f", linewidth=0.9)
    axes[0].set_ylabel("cost, %")
    if not has_budget:
        axes[1].set_ylabel("tokens per slot")
    axes[-1].set_xticks(range(len(settings)), settings)
    axes[-1].set_xlim(-0.5, len(settings) - 0.5)
    if has_legend:
        axes[0].legend(loc="best")


def setting_of(cell: Figures) -> str:
    """The value alone: `tau_0.85_budget` is 0.85."""
    parts = cell["method"].split("_")
    return parts[1] if len(parts) > 1 else parts[0]
