"""The report of an evaluation: a page, a Markdown section, and its plots."""

from __future__ import annotations

import html
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from ...conversion.staging import staged_file
from ..files import write_text
from .blocks import Block, Cell, Fold, Listing, Paragraph, Plot, Row, Section, Table
from .plots import draw_plots
from .sections import date_of, make_sections, title_of_report

Plots = dict[str, list[Plot]] | None

# Longer than the rest of a card together.
PAGE_ONLY = ("groups",)


def write_report(metrics: dict[str, Any], folder: Path) -> None:
    """Write `report.html`, `report.md` and the `plots` of the figures in `metrics.json` into `folder`."""
    plots = draw_if_possible(metrics)
    save_plots([plot for part in (plots or {}).values() for plot in part], folder / "plots")
    write_text(folder / "report.html", html_page(metrics, plots))
    write_text(folder / "report.md", markdown_section(metrics, plots))


def draw_if_possible(metrics: dict[str, Any]) -> Plots:
    """The plots by section; None without matplotlib: hours of measuring shall not end without a report."""
    try:
        return draw_plots(metrics)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        return None


def save_plots(plots: list[Plot], folder: Path) -> None:
    """Write every plot as `NAME.svg` and `NAME.png`."""
    for plot in plots:
        write_text(folder / f"{plot.name}.svg", plot.svg_file)
        with staged_file(folder / f"{plot.name}.png") as staged:
            staged.write_bytes(plot.png_file)


def html_page(metrics: dict[str, Any], plots: Plots) -> str:
    """One page that needs nothing from outside; everything in it is escaped but the plots' own SVG."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        title=title_of_report(metrics), date=date_of(metrics), sections=make_sections(metrics, plots)
    )


def markdown_section(metrics: dict[str, Any], plots: Plots) -> str:
    """The report for a model card; it links the plots that are not small, as `plots/NAME.png`."""
    sections = [section for section in make_sections(metrics, plots) if section.name not in PAGE_ONLY]
    opening = [f"## {escaped(title_of_report(metrics))}", f"Measured on {escaped(date_of(metrics))}."]
    return "\n\n".join([*opening, *(part for section in sections for part in _section(section))]) + "\n"


def escaped(text: str) -> str:
    """Text for Markdown, tables included: no HTML, no column, no code and no line break begins in it."""
    text = html.escape(text, quote=False).replace("\n", " ")
    for mark in "\\|`*":
        text = text.replace(mark, f"\\{mark}")
    return text


def _section(section: Section) -> list[str]:
    parts = [f"### {escaped(section.title)}"]
    if section.alarming:
        return [*parts, "\n".join(f"- **{escaped(b.text)}**" for b in section.blocks if isinstance(b, Paragraph))]
    return [*parts, *(text for block in folded(section.blocks) for text in _block(block))]


def folded(blocks: list[Block]) -> list[Block]:
    """All titled tables but the first as folds: a card shows what matters most, and the rest on demand."""
    titled = [block for block in blocks if isinstance(block, Table) and block.title]
    return [Fold(b.title, [b]) if isinstance(b, Table) and b in titled[1:] else b for b in blocks]


def _block(block: Block) -> list[str]:
    if isinstance(block, Paragraph):
        return [escaped(block.text)]
    if isinstance(block, Listing):
        # Longer than any fence within.
        fence = "`" * max(3, 1 + max((len(run) for run in block.text.split() if set(run) == {"`"}), default=0))
        return [f"{fence}bash\n{block.text}\n{fence}"]
    if isinstance(block, Plot):
        title = escaped(block.title)
        return [] if block.small else [f"**{title}**", f"![{title}](plots/{block.name}.png)", escaped(block.text)]
    if isinstance(block, Fold):
        inner = [text for b in block.blocks for text in _block(b)]
        return ["<details>", f"<summary>{html.escape(block.title)}</summary>", *inner, "</details>"]
    heading = [f"**{escaped(block.title)}**"] if block.title else []
    return [*heading, *([escaped(block.text)] if block.text else []), _table(block)]


def _table(table: Table) -> str:
    names = [escaped(name) + (f" ({escaped(text)})" if text else "") for name, text in table.columns]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    groups = {row.group for row in table.rows}
    before = None
    for row in table.rows:
        if len(groups) > 1 and row.group and row.group != before:
            lines.append(f"| *{escaped(row.group)}* |" + " |" * len(row.cells))
        before = row.group
        lines.append(_line(row))
    return "\n".join(lines)


def _line(row: Row) -> str:
    return "| " + " | ".join([escaped(row.label), *map(_entry, row.cells)]) + " |"


def _entry(cell: Cell) -> str:
    text = escaped(cell.text)
    text = f"**{text}**" if cell.best else text
    return f"{text} ({escaped(cell.note)})" if cell.note else text
