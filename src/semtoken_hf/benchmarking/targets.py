"""What is to be reached, beside what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .figures import best_variant, kv_overhead, per_token, speedup, stage_share, to_limit
from .variants import RAGGED

RATIO = 2.4
# Time per token may drift so far between the ends of a range and still count as linear.
LINEAR = 1.25
MILLION = 1_048_576

Found = dict[str, list[dict[str, Any]]]


@dataclass
class Verdict:
    """One target.

    Attributes:
        target: in words.
        measured: figures, each with what it was measured on; empty: not measured.
        is_met: None where nothing was measured.
        note: what the figures are of.
    """

    target: str
    measured: list[str]
    is_met: bool | None
    note: str = ""

    @property
    def word(self) -> str:
        return "not measured" if self.is_met is None else "met" if self.is_met else "**missed**"


def judge(found: Found) -> list[Verdict]:
    """Every target, in the order of the report."""
    cells = [c for c in found["cells"] if c["ratio"] == RATIO]
    big = [c for c in cells if c["shape"] == "1.1b" and c["dtype"] == "bfloat16" and c["batch"] == "1"]
    small = [c for c in cells if c["shape"] == "160m" and "static" in c["encoder"] and c["batch"] == "1"]
    skewed = [c for c in cells if c["batch"] == "skewed"]
    return [
        _whole("whole generate, 1.1b, 4,096 tokens: at most 1.05 x plain at m", big, 1.05),
        _bound(
            "prefill, 1.1b, 8 K tokens and more: at least 2.4 x faster than plain at n",
            [c for c in big if c["length"] >= 8192],
            lambda c: speedup(c, best_variant(c), "prefill"),
            least=2.4,
        ),
        _whole("whole generate, 160m, static encoder, 4,096 tokens: at most 1.08 x plain at m", small, 1.08),
        _bound(
            "stage without the encoder, 1.1b: at most 2 % of SemToken's own prefill",
            big,
            lambda c: stage_share(c, encoder=False),
            most=0.02,
            percent=True,
        ),
        *_stage_verdicts([s for s in found["stage"] if "skipped" not in s and s["ratio"] == RATIO]),
        _bound(
            "encoder, 1.1b, 2 K, 8 K, 16 K tokens: at most 3 % of SemToken's own prefill",
            [c for c in big if c["length"] in (2048, 8192, 16384)],
            lambda c: stage_share(c, encoder=True),
            most=0.03,
            percent=True,
            needed=[2048, 8192, 16384],
        ),
        _bound(
            "KV bytes of a skewed batch, ragged attention: at most 1.1 x the sum of the rows' slots",
            skewed,
            lambda c: kv_overhead(c, RAGGED),
            most=1.1,
        ),
    ]


def _whole(target: str, cells: list[dict[str, Any]], most: float) -> Verdict:
    """A bound on a whole generate of 4,096 tokens over the limit."""
    return _bound(target, [c for c in cells if c["length"] == 4096], lambda c: to_limit(c, best_variant(c)), most=most)


def _bound(
    target: str,
    cells: list[dict[str, Any]],
    figure: Callable[[dict[str, Any]], float | None],
    most: float | None = None,
    least: float | None = None,
    percent: bool = False,
    needed: list[int] | None = None,
) -> Verdict:
    """A bound that every cell has to keep; met only where all lengths of `needed` were measured."""
    pairs = [(cell, value) for cell in cells if (value := figure(cell)) is not None]
    texts = [f"{_place(cell)}: {100 * v:.2f} %" if percent else f"{_place(cell)}: {v:.3f}" for cell, v in pairs]
    if not pairs:
        return Verdict(target, [], None)
    kept = all((most is None or v <= most) and (least is None or v >= least) for _, v in pairs)
    lacking = sorted(set(needed or []) - {cell["length"] for cell, _ in pairs})
    if kept and lacking:
        return Verdict(target, texts, None, f"not measured: {', '.join(f'{n:,}' for n in lacking)} tokens")
    return Verdict(target, texts, kept)


def _stage_verdicts(stages: list[dict[str, Any]]) -> list[Verdict]:
    """Time and memory of the stage alone, each linear up to a million tokens, for every shape and encoder."""
    time = f"stage without the encoder: time linear to {MILLION:,} tokens (per token within {LINEAR} x)"
    memory = f"stage without the encoder: peak extra memory linear to {MILLION:,} tokens (per token within {LINEAR} x)"
    series: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for stage in stages:
        series.setdefault((stage["shape"], stage["encoder"], stage["device"]), []).append(stage)
    if not series:
        return [Verdict(time, [], None), Verdict(memory, [], None)]
    verdicts = []
    for (shape, encoder, _), results in series.items():
        for target, name, unit in ((time, "us", "us"), (memory, "bytes", "bytes")):
            known = [(r["length"], value) for r in results if (value := per_token(r)[name]) is not None]
            texts = [f"{n:,}: {value:,.2f} {unit} per token" for n, value in known]
            title = f"{target}, {shape}, {encoder}"
            if len(known) < 2 or known[-1][0] < MILLION:
                verdicts.append(Verdict(title, texts, None, "too few lengths"))
                continue
            # Not over the shortest: fixed costs are most of what that takes.
            grown = known[-1][1] / min(value for _, value in known)
            verdicts.append(Verdict(title, texts, grown <= LINEAR, f"the longest {grown:.2f} x the least"))
    return verdicts


def _place(cell: dict[str, Any]) -> str:
    parts = [cell["shape"], cell["encoder"], f"batch {cell['batch']}", f"{cell['length']:,} tokens", cell["device"]]
    return ", ".join(parts)


def verdict_table(found: Found) -> list[str]:
    """The targets as lines of Markdown."""
    lines = ["| target | measured | |", "|---|---|---|"]
    for verdict in judge(found):
        texts = [*verdict.measured, *([verdict.note] if verdict.note else [])]
        lines.append(f"| {verdict.target} | {'; '.join(texts) or '-'} | {verdict.word} |")
    return lines


__all__ = ["Verdict", "judge", "verdict_table"]
