"""The results of a folder as Markdown and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..evaluation.files import write_text
from .clock import median_ratio, summary
from .figures import best_variant, kv_overhead, per_token, speedup, stage_seconds, stage_share, to_limit
from .plot import draw_speed
from .targets import verdict_table
from .variants import PADDED, PLAIN_N, RAGGED, TITLES

Found = dict[str, list[dict[str, Any]]]
AUTHORS = (
    "The SemToken authors' released code never runs a language model, so there are no timings of theirs to repeat; "
    "their 1.9 x is a claim of the paper."
)


def write_report(found: Found, folder: Path) -> None:
    """Write `benchmark.md`, and `speed.png` where something was measured that it shows."""
    sections: list[tuple[str, Callable[[Found], list[str]]]] = [
        ("Targets", verdict_table),
        ("Time and memory", time_table),
        ("The compression stage within a prefill", stage_table),
        ("The compression stage alone", stage_only_table),
        ("torch.compile", compile_table),
        ("kvpress", press_table),
        ("Skipped", skipped_list),
        ("Where the figures come from", origins),
    ]
    lines = ["# Speed and memory", "", *explanation()]
    for title, render in sections:
        if body := render(found):
            lines += ["", f"## {title}", "", *body]
    drawn = draw_speed(found["cells"])
    if drawn is not None:
        (folder / "speed.png").write_bytes(drawn)
        lines += ["", "![Speedup over plain Llama, and distance to the limit](speed.png)"]
    write_text(folder / "benchmark.md", "\n".join([*lines, ""]))


def explanation() -> list[str]:
    return [
        "Random weights of the named shapes, real text. Every variant in turn in one process, without the first round; "
        "medians, interquartile range in brackets, ratios as medians of the ratios of each round. n: tokens of the "
        "prompt; m: its slots. Plain at m: plain Llama on the same weights, given a prompt that is already m tokens "
        "long (in a batch, each row as long as its own slots), which is the limit. Prefill: to the first token of "
        "`generate`. Peak: memory of a prefill beyond what was held before it, keys and values included.",
        "",
        AUTHORS,
    ]


def _times(samples: list[float], scale: float = 1e3) -> str:
    found = summary(samples)
    return f"{scale * found['median']:,.1f} ({scale * found['iqr']:,.1f})"


def _number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    if not rows:
        return []
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _head(cell: dict[str, Any]) -> list[str]:
    return [cell["shape"], cell["encoder"], cell["batch"], f"{cell['length']:,}", f"{cell['ratio']:g}"]


HEAD = ["shape", "encoder", "batch", "n", "ratio"]


def time_table(found: Found) -> list[str]:
    header = [*HEAD, "variant", "slots", "prefill, ms", "decode, ms/token", "generate, ms", "generate / plain at m"]
    header += [
        "prefill, x faster than n",
        "generate, x faster than n",
        "KV, MB",
        "KV / own slots",
        "peak, MB",
        "rounds",
    ]
    rows = []
    for cell in found["cells"]:
        for name, variant in cell["variants"].items():
            peak = variant["peak_bytes"]
            rows.append(
                [
                    *_head(cell),
                    TITLES[name],
                    " + ".join(f"{n:,}" for n in variant["slots"]),
                    *(_times(variant[time]) for time in ("prefill", "decode", "generate")),
                    _number(to_limit(cell, name), ".3f"),
                    *(_number(speedup(cell, name, time)) for time in ("prefill", "generate")),
                    f"{variant['kv_bytes'] / 1e6:,.2f}",
                    _number(kv_overhead(cell, name)),
                    _number(None if peak is None else peak / 1e6, ",.1f"),
                    str(len(variant["generate"])),
                ]
            )
    return _table(header, rows)


def stage_table(found: Found) -> list[str]:
    cells = [cell for cell in found["cells"] if cell["stages"]]
    parts = list(dict.fromkeys(name for cell in cells for name in stage_seconds(cell)))
    header = [*HEAD, *(f"{name}, ms" for name in parts), "whole stage, ms", "stage without encoder / prefill"]
    header += ["encoder / prefill", "encoder / generate"]
    rows = []
    for cell in cells:
        seconds = stage_seconds(cell)
        rows.append(
            [
                *_head(cell),
                *(_number(1e3 * seconds[name], ",.2f") if name in seconds else "-" for name in parts),
                _times(cell["stage"]),
                _share(stage_share(cell, encoder=False)),
                _share(stage_share(cell, encoder=True)),
                _share(stage_share(cell, encoder=True, time="generate")),
            ]
        )
    return _table(header, rows)


def stage_only_table(found: Found) -> list[str]:
    header = ["shape", "encoder", "n", "ratio", "slots", "without encoder, us/token", "encoder, us/token"]
    header += ["peak extra, bytes/token", "without encoder / SemToken's prefill"]
    rows = []
    for result in found["stage"]:
        if "skipped" in result:
            continue
        figures = per_token(result)
        prefill = _prefill_of(found, result)
        share = None if prefill is None else statistics.median(result["seconds"]) / prefill
        rows.append(
            [
                result["shape"],
                result["encoder"],
                f"{result['length']:,}",
                f"{result['ratio']:g}",
                f"{sum(result['slots']):,}",
                _number(figures["us"], ".3f"),
                _number(figures["encoder_us"], ".3f"),
                _number(figures["bytes"], ",.0f"),
                _share(share),
            ]
        )
    return _table(header, rows)


def _prefill_of(found: Found, stage: dict[str, Any]) -> float | None:
    """Median seconds of SemToken's prefill of one prompt of the same length, on the same shape and device."""
    for cell in found["cells"]:
        alike = all(cell[name] == stage[name] for name in ("shape", "length", "ratio", "device", "dtype"))
        if alike and cell["batch"] == "1" and PADDED in cell["variants"]:
            return statistics.median(cell["variants"][PADDED]["prefill"])
    return None


def compile_table(found: Found) -> list[str]:
    header = ["shape", "n", "ratio", "what", "eager, ms", "compiled, ms", "eager / compiled"]
    header += ["first call, s", "graphs", "graph breaks"]
    rows = []
    for result in found["compiled"]:
        for record in result["records"]:
            row = [result["shape"], f"{result['length']:,}", f"{result['ratio']:g}", record["what"]]
            row.append(_times(record["eager"]))
            if "error" in record:
                row += [f"fails: {record['error']}".replace("|", "\\|"), *["-"] * 4]
            else:
                ratio = median_ratio(record["eager"], record["compiled"])
                row += [_times(record["compiled"]), _number(ratio), f"{record['compile_seconds']:.1f}"]
                row += [str(record["graphs"]), str(record["graph_breaks"])]
            rows.append(row)
    return _table(header, rows)


def press_table(found: Found) -> list[str]:
    """Presses and SemToken, each against plain Llama at n in its own environment."""
    header = ["shape", "n", "ratio", "variant", "prefill, x faster than n", "decode, x faster", "generate, x faster"]
    header += ["KV / plain at n"]
    rows = []
    for result in found["kvpress"]:
        plain = result["variants"]["plain"]
        for name, variant in result["variants"].items():
            if name == "plain":
                continue
            ratios = [_number(median_ratio(plain[time], variant[time])) for time in ("prefill", "decode", "generate")]
            share = _number(variant["kv_bytes"] / plain["kv_bytes"])
            rows.append([result["shape"], f"{result['length']:,}", f"{result['ratio']:g}", name, *ratios, share])
        rows += _beside_presses(found, result)
    if not rows:
        return []
    text = "Each against plain Llama at n in the same process: kvpress runs in an older Transformers of its own."
    return [text, "", *_table(header, rows)]


def _beside_presses(found: Found, result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for cell in found["cells"]:
        alike = all(cell[name] == result[name] for name in ("shape", "length", "ratio", "dtype", "device"))
        variant = best_variant(cell)
        if not alike or cell["batch"] != "1" or not {variant, PLAIN_N} <= cell["variants"].keys():
            continue
        ratios = [_number(speedup(cell, variant, time)) for time in ("prefill", "decode", "generate")]
        share = _number(cell["variants"][variant]["kv_bytes"] / cell["variants"][PLAIN_N]["kv_bytes"])
        title = f"{TITLES[variant]}, {cell['encoder']}"
        rows.append([cell["shape"], f"{cell['length']:,}", f"{cell['ratio']:g}", title, *ratios, share])
    return rows


def skipped_list(found: Found) -> list[str]:
    lines = [
        f"- {', '.join(_head(cell))}, {TITLES[name]}: {reason}"
        for cell in found["cells"]
        for name, reason in cell["skipped"].items()
    ]
    lines += [
        f"- stage alone, {r['shape']}, {r['encoder']}, {r['length']:,}: {r['skipped']}"
        for r in found["stage"]
        if "skipped" in r
    ]
    if found["cells"] and not any(RAGGED in cell["variants"] for cell in found["cells"]):
        lines.append(f"- {TITLES[RAGGED]}: no batch of several rows, or `{RAGGED}` attention is not registered")
    lines += [
        f"- {', '.join(_head(cell))}: one round, without another one to warm up"
        for cell in found["cells"]
        if cell["variants"] and not cell["warmed_up"]
    ]
    return lines


def origins(found: Found) -> list[str]:
    """Commands, versions, machines and dates, each once."""
    results = [result for kind in ("cells", "stage", "compiled", "kvpress") for result in found[kind]]
    known = {tuple(sorted(result["provenance"].items())): None for result in results}
    return [f"- {'; '.join(f'{name}: `{value}`' for name, value in origin)}" for origin in known]


__all__ = ["write_report"]
