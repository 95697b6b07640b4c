"""Speedup over the length of the prompt, and the distance to the limit; matplotlib is imported when it is drawn."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from .figures import best_variant, speedup, to_limit

Cells = list[dict[str, Any]]


def draw_speed(cells: Cells) -> bytes | None:
    """A PNG of three panels; None where there is nothing to show."""
    series: dict[str, Cells] = {}
    for cell in cells:
        if best_variant(cell) in cell["variants"]:
            title = f"{cell['shape']}, {cell['encoder']}, batch {cell['batch']}, {cell['ratio']:g}x, {cell['device']}"
            series.setdefault(title, []).append(cell)
    if not series:
        return None
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from ..evaluation.report.plot_style import MARKERS, STYLE

    panels: list[tuple[str, Callable[[dict[str, Any]], float | None]]] = [
        ("prefill: plain at n / SemToken", lambda c: speedup(c, best_variant(c), "prefill")),
        ("whole generate: plain at n / SemToken", lambda c: speedup(c, best_variant(c), "generate")),
        ("whole generate: SemToken / plain at m (the limit is 1)", lambda c: to_limit(c, best_variant(c))),
    ]
    with rc_context(STYLE):
        figure = Figure(figsize=(13, 4.4), layout="constrained")
        for axes, (title, value) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            for place, (label, found) in enumerate(series.items()):
                points = [(c["length"], y) for c in found if (y := value(c)) is not None]
                marker = MARKERS[place % len(MARKERS)]
                axes.plot([x for x, _ in points], [y for _, y in points], marker=marker, label=label, linewidth=1.4)
            lengths = sorted({cell["length"] for cell in cells})
            # Also gives an axis without any point its range.
            axes.hlines(1.0, lengths[0], lengths[-1], color="#7d868f", linewidth=1, linestyle=":")
            axes.set_xscale("log", base=2)
            axes.set_xticks(lengths, [f"{n / 1024:g} K" if n >= 1024 else str(n) for n in lengths])
            axes.set_xlabel("tokens of the longest prompt")
            axes.set_title(title)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        raster = io.BytesIO()
        figure.savefig(raster, dpi=120, format="png", facecolor="white")
    return raster.getvalue()


__all__ = ["draw_speed"]
