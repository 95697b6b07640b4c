"""The tables of speed, long contexts, ablations and the configuration, as data."""

from __future__ import annotations

import math
from typing import Any

from ..provenance import without_folder
from .blocks import Cell, Row, Table
from .figures import Figures, finite
from .tables import COST, cost_cell, percent, rise, shown

GROUP_TITLES = {
    "tau": "Similarity threshold tau, without a budget",
    "tau_budget": "Similarity threshold tau, at the budget",
    "delta": "Entropy threshold delta, without a budget",
    "segmentation": "How spans are cut",
    "span": "Longest span",
    "query": "How much the question decides",
    "radius": "Fingerprint radius k",
    "window": "Window of the encoder",
}


def speed_tables(speed: list[Figures]) -> list[Table]:
    """One table for every prompt length."""
    return [_speed_table(length, speed) for length in sorted({r["length"] for r in speed})]


def _speed_table(length: int, speed: list[Figures]) -> Table:
    records = [r for r in speed if r["length"] == length]
    full: Figures = next((r for r in records if r["method"] == "full"), {})

    def against(record: Figures, name: str, form: str) -> Cell:
        value, whole = finite(record.get(name)), finite(full.get(name))
        return Cell(shown(record.get(name), form), percent(value / whole) if value is not None and whole else "")

    rows = [
        Row(
            r["title"] if r["ratio"] is None else f"{r['title']}, {r['ratio']:g} tokens per slot",
            [
                Cell(shown(r.get("slots"), ",.0f")),
                Cell(shown(r.get("kv_bytes"), ",.1f", 1e-6)),
                against(r, "prefill_ms", ",.1f"),
                Cell(shown(r.get("encoder_ms"), ",.1f"), percent(r.get("encoder_share"))),
                against(r, "decode_ms", ",.2f"),
                against(r, "end_to_end_ms", ",.0f"),
                Cell(shown(r.get("repetitions"), ",.0f")),
            ],
        )
        for r in records
    ]
    columns = [
        ("method", ""),
        ("slots", ""),
        ("KV cache", "MB"),
        ("prefill", "ms; % of full"),
        ("encoder", "ms; % of end to end"),
        ("decode", "ms per token; % of full"),
        ("end to end", "ms; % of full"),
        ("repetitions", ""),
    ]
    return Table(f"{length:,} tokens", "", columns, rows)


def long_context_table(records: list[Figures]) -> Table:
    """Perplexity behind contexts of every length, against the plain model over what it has positions for."""
    plain = next((r for r in records if r["length"] == r["slots"]), None)
    rows = []
    for r in records:
        nll, base = finite(r.get("nll")), finite(plain.get("nll")) if plain else None
        against = math.exp(nll - base) - 1 if nll is not None and base is not None else None
        cells = [
            Cell(shown(r["length"], ",.0f")),
            Cell(shown(r["slots"], ",.0f")),
            Cell(shown(r["length"] / r["slots"], ".1f")),
            Cell(shown(r["examples"], ",.0f")),
            Cell(shown(r.get("perplexity"), ",.2f")),
            Cell(rise(against)),
        ]
        rows.append(Row(r["title"], cells))
    names = ("way to read", "context tokens", "slots", "tokens per slot", "examples", "perplexity", "against plain")
    return Table("", "", [(name, "") for name in names], rows)


def ablation_tables(cells: list[Figures]) -> list[Table]:
    """One table for every group of ablations of every task."""
    tables = []
    for title, own in ablation_groups(cells):
        # Without a budget every setting has another number of slots: none is the best.
        least = _least_nll(own) if all(c["ratio"] is not None for c in own) else {}
        rows = [_ablation_row(c, c.get("nll") == least.get(c.get("checkpoint"), math.nan)) for c in own]
        names = [
            ("setting", ""),
            (COST.title.lower(), "standard error; perplexity"),
            ("gain kept", ""),
            ("tokens per slot", ""),
        ]
        tables.append(Table(title, "", [*names, ("examples", "")], rows))
    return tables


def ablation_groups(cells: list[Figures]) -> list[tuple[str, list[Figures]]]:
    """Title and cells of every group of ablations of every task."""
    groups: dict[tuple[str, str], list[Figures]] = {}
    for c in cells:
        if c.get("ablation"):
            groups.setdefault((c["task"], c["ablation"]), []).append(c)
    several = len({task for task, _ in groups}) > 1
    return [
        (GROUP_TITLES.get(group, group) + (f" ({own[0]['task_title']})" if several else ""), own)
        for (_, group), own in groups.items()
    ]


def _least_nll(cells: list[Figures]) -> dict[str | None, float]:
    """By checkpoint."""
    least: dict[str | None, float] = {}
    for c in cells:
        if (nll := finite(c.get("nll"))) is not None:
            least[c.get("checkpoint")] = min(nll, least.get(c.get("checkpoint"), math.inf))
    return least


def _ablation_row(cell: Figures, is_best: bool) -> Row:
    cost = cost_cell(cell)
    entries = [
        Cell(cost.text, cost.note, is_best),
        Cell(percent(cell.get("gain_kept"))),
        Cell(shown(cell.get("tokens_per_slot"), ".2f")),
        Cell(shown(cell["examples"], ",.0f")),
    ]
    return Row(cell["title"], entries, cell.get("checkpoint") or "")


def provenance_table(provenance: dict[str, Any]) -> Table:
    rows = [Row(name, [Cell(str(value))]) for name, value in provenance.items()]
    return Table("", "", [("", ""), ("", "")], rows)


def configuration_table(config: dict[str, Any]) -> Table:
    rows = [Row(name, [Cell(_listed(value))]) for name, value in without_folders(config).items()]
    return Table("", "", [("option", ""), ("value", "")], rows)


def without_folders(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the machine's folders: of absolute paths the last part is left."""

    def shortened(value: Any) -> Any:
        if isinstance(value, list):
            return [shortened(v) for v in value]
        return without_folder(value) if isinstance(value, str) else value

    return {name: shortened(value) for name, value in config.items()}


def _listed(value: Any) -> str:
    if value is None or value == []:
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
