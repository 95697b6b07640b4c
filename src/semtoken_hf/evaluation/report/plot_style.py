"""How plots look, and how a figure of matplotlib becomes an inline SVG and two files."""

from __future__ import annotations

import io
import re
from typing import Any

from .blocks import Plot
from .figures import Variant

# Stands for the page's text colour; on files it is what it says.
INK = "#23282e"
STYLE: Any = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "svg.fonttype": "none",
    # The same figures give the same ids.
    "svg.hashsalt": "semtoken",
    # A dollar in a title is a dollar.
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "grid.color": "#8a939c",
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
# Legible on white and on near-black; apart for the colour-blind, with the markers.
COLOURS = {
    "references": "#7d868f",
    "truncation": "#e08214",
    "random": "#b8860b",
    "uniform": "#a1662f",
    "self_information": "#d6604d",
    "kvpress": "#2a9d5c",
    "SemToken": "#3b82d6",
    "SemToken, then a press": "#a05fc0",
    "further checkpoints": "#12a5b0",
    "others": "#7d868f",
}
MARKERS = "osD^vP*X<>"
DASHES = ("-", "--", "-.", ":")


def looks(variants: list[Variant]) -> dict[Variant, dict[str, Any]]:
    """Colour by family (by method for the cheap baselines), marker and dashes by place in it; SemToken stands out."""
    places: dict[str, int] = {}
    found = {}
    for variant in variants:
        place = places.setdefault(variant.family, 0)
        places[variant.family] += 1
        main = variant.method == "semtoken" and variant.checkpoint is None
        found[variant] = {
            "color": COLOURS.get(variant.method) or COLOURS[variant.family],
            "marker": MARKERS[place % len(MARKERS)],
            "linestyle": "-" if main else DASHES[place % len(DASHES)],
            "linewidth": 2.6 if main else 1.2,
            "markersize": 7 if main else 5,
            "zorder": 5 if main else 3,
            "label": variant.title,
        }
    return found


def as_plot(figure: Any, name: str, title: str, text: str, small: bool = False) -> Plot:
    """A figure of matplotlib, drawn within `STYLE`, as a block of the report."""
    vector, raster = io.StringIO(), io.BytesIO()
    figure.savefig(raster, dpi=110, format="png", facecolor="white")
    # Without a date the same figures give the same file.
    figure.savefig(vector, format="svg", facecolor="white", metadata={"Date": None})
    inline = io.StringIO()
    figure.savefig(inline, format="svg", transparent=True, metadata={"Date": None})
    return Plot(name, title, text, inlined(inline.getvalue(), name), vector.getvalue(), raster.getvalue(), small)


def inlined(svg: str, name: str) -> str:
    """An SVG file as a part of a page: in the page's text colour, its ids its own, nothing around it."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    return svg.replace(INK, "currentColor")
