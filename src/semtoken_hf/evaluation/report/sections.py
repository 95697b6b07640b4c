"""The report as a document: which blocks it has, in which order, and what it says between them."""

from __future__ import annotations

from pathlib import Path

from .blocks import Block, Fold, Listing, Paragraph, Plot, Section
from .detail_tables import (
    ablation_tables,
    configuration_table,
    long_context_table,
    provenance_table,
    speed_tables,
)
from .figures import Figures, at_ratio, methods_only, ratios_of, tasks_of, title_of_task
from .tables import (
    COST,
    SCORE,
    aspect_table,
    aspect_tables,
    group_columns,
    ratio_columns,
    split_questions,
    task_columns,
)

HOW_TO_READ = (
    "Every method reads the same prompts within the same number of slots, the positions of the KV cache: methods are "
    "compared at equal bytes. A ratio of 2.4 means 2.4 tokens of the prompt per slot. The question is meant to "
    "stay whole.",
    "Cost is the rise in perplexity of what is scored, the continued text or the gold answer, over the full context; ± "
    "is its standard error over the examples. Gain kept is the share of what the full context gains over no context. "
    "Answer kept is the share of the gold answer's tokens in the context that have a slot of their own. The score is "
    "that of the generated answer, by the metric of its task.",
    "A small model generates few right answers, whatever it reads. There the likelihood of the gold answer tells the "
    "methods apart and the score does not.",
    "Bold: the best of a column among the methods within the budget, by however little; the full context and no "
    "context are references.",
)
PRESSES = (
    "kvpress prunes the cache after reading the whole context, so it saves memory and not reading time. It runs in an "
    "environment of its own with older versions, which counts when its times are compared."
)


def title_of_report(metrics: Figures) -> str:
    return f"Evaluation of {Path(metrics['config']['checkpoint']).name}"


def date_of(metrics: Figures) -> str:
    return str(metrics.get("provenance", {}).get("date", "date unknown"))


def make_sections(metrics: Figures, plots: dict[str, list[Plot]] | None) -> list[Section]:
    """The whole report; sections without content are left out.

    Args:
        plots: by section; None: they could not be drawn.
    """
    drawn = plots or {}
    sections = [
        _alarms(metrics),
        Section("reading", "How to read this", [Paragraph(text) for text in HOW_TO_READ]),
        _results(metrics),
        Section("memory", "Quality against memory", [*drawn.get("memory", [])]),
        Section("time", "Quality against time", [*drawn.get("time", [])]),
        _speed(metrics),
        _long_contexts(metrics),
        Section("ablations", "Ablations", _ablations(metrics, drawn.get("ablations", []))),
        Section("groups", "By group of examples", _groups(metrics)),
        _provenance(metrics, plots is None),
    ]
    return [section for section in sections if section.blocks]


def _alarms(metrics: Figures) -> Section:
    alarms = [Paragraph(alarm) for alarm in metrics.get("alarms", [])]
    return Section("alarms", "Alarms", [*alarms] or [Paragraph("No alarm.")], alarming=bool(alarms))


def _results(metrics: Figures) -> Section:
    cells, blocks = methods_only(metrics), list[Block]()
    first, *further = ratios_of(metrics)
    if first is not None:
        blocks.append(Paragraph(f"At {first:g} tokens per slot{'; other ratios follow' if further else ''}."))
    blocks += aspect_tables(task_columns(at_ratio(cells, first)))
    for ratio in further:
        tables = aspect_tables(task_columns(at_ratio(cells, ratio)))
        blocks.append(Fold(f"The same at {ratio:g} tokens per slot", [*tables]))
    for task in tasks_of([c for c in cells if c["is_perplexity"]]):
        columns = ratio_columns(cells, task)
        if len(columns) > 1 and (table := aspect_table(COST, columns, "")):
            blocks.append(Fold(f"{title_of_task(cells, task)} at every ratio", [table]))
    if any(c["method"].startswith("kvpress_") for c in cells):
        blocks.append(Paragraph(PRESSES))
    if split := split_questions(metrics):
        blocks.append(Paragraph(f"Tokens of the question were merged or dropped: {'; '.join(split)}."))
    return Section("results", "Methods and tasks", blocks if cells else [])


def _speed(metrics: Figures) -> Section:
    tables = speed_tables(metrics.get("speed", []))
    text = Paragraph(
        "Medians of repeated runs in one process. End to end is the prefill and 64 new tokens. Percentages of full are "
        "against the plain model over the whole prompt."
    )
    return Section("speed", "Speed", [text, *tables] if tables else [])


def _long_contexts(metrics: Figures) -> Section:
    records = metrics.get("long_contexts", [])
    text = Paragraph(
        "Perplexity of the same targets behind longer and longer contexts, always in the slots that the model has "
        "positions for; the plain model reads as much of the recent text as fits."
    )
    return Section(
        "long", "Contexts longer than the model's positions", [text, long_context_table(records)] if records else []
    )


def _ablations(metrics: Figures, plots: list[Plot]) -> list[Block]:
    tables = ablation_tables(metrics["cells"])
    text = Paragraph(
        "One field of the configuration is changed at a time, on a part of the text; bars are standard errors. "
        "Thresholds without a budget give the ratio that they give: their costs are at different bytes."
    )
    return [text, *plots, Fold("All settings as tables", [*tables])] if tables else []


def _groups(metrics: Figures) -> list[Block]:
    cells = methods_only(metrics)
    folds: list[Block] = []
    for task in tasks_of(cells):
        for ratio in ratios_of(metrics):
            tables = aspect_tables(group_columns(at_ratio(cells, ratio), task), (COST, SCORE))
            if tables:
                at = "" if ratio is None else f", {ratio:g} tokens per slot"
                folds.append(Fold(f"{title_of_task(cells, task)}{at}", [*tables]))
    return folds


def _provenance(metrics: Figures, without_plots: bool) -> Section:
    provenance = dict(metrics.get("provenance", {}))
    command = provenance.pop("command", None)
    blocks: list[Block] = [Listing(command)] if command else []
    if provenance:
        blocks.append(provenance_table(provenance))
    if without_plots:
        blocks.append(Paragraph("Plots are left out: matplotlib is not installed."))
    blocks.append(Fold("Configuration", [configuration_table(metrics["config"])]))
    return Section("provenance", "Provenance and configuration", blocks)
