"""The tables that compare the methods, as data: one table for every aspect of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .blocks import MISSING, Cell, Row, Table
from .figures import Figures, Variant, finite, methods_only, tasks_of, variant_of, variants_of


def shown(value: Any, form: str, scale: float = 1.0, unit: str = "") -> str:
    """A number as text; what was not measured, and what is not a number, are said to be that."""
    if value is None:
        return MISSING
    if (number := finite(value)) is None:
        return "not finite"
    text = f"{number * scale:{form}}"
    if not text.strip("+-0.,"):
        text = text.replace("-", "+" if "+" in form else "")
    return text + unit


def percent(value: Any) -> str:
    return shown(value, ",.0f", 100, " %")


def rise(value: Any) -> str:
    return shown(value, "+,.1f", 100, " %")


def scored_level(figures: Figures) -> str:
    """Perplexity of a text, nats per token of an answer."""
    return shown(figures["perplexity"], ",.2f") if "perplexity" in figures else shown(figures.get("nll"), ".3f")


def cost_cell(figures: Figures) -> Cell:
    if "cost" not in figures:
        return Cell(scored_level(figures))
    spread = "" if "spread" not in figures else f"± {shown(figures['spread'], ',.1f', 100)}; "
    return Cell(rise(figures["cost"]), spread + scored_level(figures))


def score_cell(figures: Figures) -> Cell:
    lost = figures.get("score_lost")
    return Cell(shown(figures.get("score"), ".1f"), "" if lost is None else shown(lost, "+.1f", -1))


def ahead_cell(figures: Figures) -> Cell:
    spread = "" if "ahead_spread" not in figures else f"± {shown(figures['ahead_spread'], '.3f')}"
    return Cell(shown(figures.get("ahead"), "+.3f"), spread)


@dataclass(frozen=True)
class Aspect:
    """What one table says about the methods.

    Attributes:
        title, text: of the table.
        cell: the entry for a cell's figures.
        value: what the entries of a column are compared by; None: no entry is better than another.
        sign: -1 where less is better.
    """

    title: str
    text: str
    cell: Callable[[Figures], Cell]
    value: Callable[[Figures], Any] | None = None
    sign: int = 1


COST = Aspect(
    "Cost",
    "Rise in perplexity of the scored text or gold answer over the full context. "
    "Also its standard error, and the perplexity of a text or the nats per token of an answer.",
    cost_cell,
    lambda f: f.get("nll"),
    -1,
)
SCORE = Aspect(
    "Score of the generated answer",
    "0 to 100; also the points above (+) or below (-) the full context.",
    score_cell,
    lambda f: f.get("score"),
)
ASPECTS = (
    COST,
    Aspect(
        "Gain kept",
        "Share of what the full context gains over no context: of perplexity for a text, of likelihood for an answer. "
        "It says little in a task where the full context hardly helps.",
        lambda f: Cell(percent(f.get("gain_kept"))),
        lambda f: f.get("gain_kept"),
    ),
    Aspect(
        "Against truncation",
        "Nats per scored token below truncation in the same number of slots: above 0 is better than a cut prompt. "
        "Also the standard error, by the paired differences over examples.",
        ahead_cell,
        lambda f: f.get("ahead"),
    ),
    SCORE,
    Aspect(
        "Answer kept",
        "Share of the gold answer's tokens in the context that have a slot of their own.",
        lambda f: Cell(percent(f.get("answer_kept"))),
        lambda f: f.get("answer_kept"),
    ),
    Aspect(
        "Memory",
        "Tokens of the prompt per slot; also the bytes of KV cache behind the prompt, against the full context.",
        lambda f: Cell(
            shown(f.get("tokens_per_slot"), ".2f"), f"{percent(f['kv_share'])} of KV" if "kv_share" in f else ""
        ),
    ),
)


@dataclass(frozen=True)
class Column:
    """A column of figures, one per variant."""

    title: str
    text: str
    figures: dict[Variant, Figures]


def task_columns(cells: list[Figures]) -> list[Column]:
    columns = []
    for task in tasks_of(cells):
        own = [c for c in cells if c["task"] == task]
        columns.append(
            Column(own[0]["task_title"], f"{own[0]['metric']}, {_examples(own)}", {variant_of(c): c for c in own})
        )
    return columns


def group_columns(cells: list[Figures], task: str) -> list[Column]:
    """A column for every group of a task's examples."""
    own = [c for c in cells if c["task"] == task and c.get("groups")]
    names = sorted({name for c in own for name in c["groups"]}, key=_as_read)
    return [
        Column(
            name,
            _examples(c["groups"][name] for c in own if name in c["groups"]),
            {variant_of(c): c["groups"][name] for c in own if name in c["groups"]},
        )
        for name in names
    ]


def ratio_columns(cells: list[Figures], task: str) -> list[Column]:
    """A column for every ratio that a task was measured at; what has no ratio stands in all."""
    own = [c for c in cells if c["task"] == task]
    return [
        Column(f"{ratio:g}", "tokens per slot", {variant_of(c): c for c in own if c["ratio"] in (None, ratio)})
        for ratio in sorted({c["ratio"] for c in own} - {None})
    ]


def aspect_table(aspect: Aspect, columns: list[Column], title: str | None = None) -> Table | None:
    """One aspect of every variant in every column, the best of those at the same number of slots marked.

    Returns:
        None where nothing of the kind was measured.
    """
    variants = variants_of(_as_cell(variant) for column in columns for variant in column.figures)
    filled = []
    for column in columns:
        best = _best(aspect, column)
        entries = {
            variant: Cell(cell.text, cell.note, variant in best)
            for variant, figures in column.figures.items()
            for cell in [aspect.cell(figures)]
        }
        if not all(cell.text == MISSING for cell in entries.values()):
            filled.append((column, entries))
    if not filled:
        return None
    rows = []
    for variant in variants:
        cells = [entries.get(variant, Cell(MISSING)) for _, entries in filled]
        if not all(cell.is_empty for cell in cells):
            rows.append(Row(variant.title, cells, variant.family))
    names = [("method", ""), *((column.title, column.text) for column, _ in filled)]
    return Table(aspect.title if title is None else title, aspect.text, names, rows)


def aspect_tables(columns: list[Column], aspects: Iterable[Aspect] = ASPECTS) -> list[Table]:
    return [table for aspect in aspects if (table := aspect_table(aspect, columns))]


def split_questions(metrics: Figures) -> list[str]:
    """Where a method did not leave every token of the question its own slot."""
    return [
        f"{c['task_title']}, {c['title']}" + ("" if c["ratio"] is None else f", {c['ratio']:g} tokens per slot")
        for c in methods_only(metrics)
        if c.get("question_kept") is False
    ]


def _best(aspect: Aspect, column: Column) -> set[Variant]:
    """The best variants of a column; none where they are all the same."""
    if aspect.value is None:
        return set()
    values = {w: finite(aspect.value(f)) for w, f in column.figures.items() if not w.is_reference}
    known = {w: aspect.sign * v for w, v in values.items() if v is not None}
    if len(set(known.values())) < 2:
        return set()
    return {w for w, v in known.items() if v == max(known.values())}


def _examples(cells: Iterable[Figures]) -> str:
    counts = sorted({c["examples"] for c in cells})
    return f"{counts[0]:,} examples" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,} examples"


def _as_read(name: str) -> list[tuple[int, int, str]]:
    """Sorts "depth 25 %" before "depth 100 %"."""
    return [(0, int(w), "") if w.isdigit() else (1, 0, w) for w in name.split()]


def _as_cell(variant: Variant) -> Figures:
    return {"method": variant.method, "checkpoint": variant.checkpoint, "title": variant.title}
