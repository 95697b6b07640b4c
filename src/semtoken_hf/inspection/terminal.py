"""A plan in the terminal, by rich: with colours as shades of entropy, and without any by brackets alone."""

from __future__ import annotations

import itertools
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .details import REASONS, SpanDetails
from .page import row_of
from .summary import FINE, MERGED, PlanSummary, summarise

# Foreground and background of merged spans by rising entropy; each pair has a contrast above 4.5 on any terminal.
SHADES = (
    "#000000 on #e3eefc",
    "#000000 on #bcd7fa",
    "#000000 on #8fbaf5",
    "#000000 on #5c98ea",
    "#ffffff on #2463b8",
)
PROTECTED = "underline"
# Reasons of tokens that nothing protects.
FREE = (*MERGED, *FINE)
BARS, DENSITIES = " ▁▂▃▄▅▆▇█", " ░▒▓█"
HISTOGRAM_WIDTH, PLOT_WIDTH, HISTOGRAM_ROWS = 40, 64, 16


def visible(piece: str) -> str:
    """A token's text without what could move the cursor or turn the direction of the line."""
    shown = []
    for char in piece:
        category = unicodedata.category(char)
        if char in "\n\t" or category not in ("Cc", "Cf"):
            shown.append(char)
        elif ord(char) < 0x20:
            shown.append(chr(0x2400 + ord(char)))
        elif char != "\u200d":  # what joins emoji is harmless
            shown.append("\ufffd")
        else:
            shown.append(char)
    return "".join(shown)


def plan_text(plan: SpanDetails, pieces: Sequence[str], most_tokens: int) -> Text:
    """Start and end of a plan, about `most_tokens` tokens together: [merged tokens], {protected ones}, others as they
    are.
    """
    slots, tokens = _slots(plan, pieces), len(pieces)
    head = [slot for slot in slots if slot.stop <= most_tokens // 2 or tokens <= most_tokens]
    tail = [slot for slot in slots[len(head) :] if slot.first >= tokens - most_tokens // 2]
    text = _marked(head)
    if hidden := tokens - sum(slot.stop - slot.first for slot in (*head, *tail)):
        text.append(f"\n... {hidden:,} tokens more (--max-tokens) ...\n", "italic")
    return text.append_text(_marked(tail))


@dataclass(frozen=True)
class _Slot:
    first: int
    stop: int
    content: str
    reason: str
    shade: int


def _slots(plan: SpanDetails, pieces: Sequence[str]) -> list[_Slot]:
    names, codes = list(REASONS), row_of(plan, "reason", 0).tolist()
    entropy = row_of(plan, "entropy", 0).nan_to_num()
    low = float(entropy[entropy > 0].min()) if (entropy > 0).any() else 0.0
    shades = ((entropy - low) / (entropy.max() - low).clamp(min=1e-6) * len(SHADES)).long().clamp(0, len(SHADES) - 1)
    lengths = row_of(plan, "span_ids", 0).bincount().tolist()
    slots, first = [], 0
    for length in lengths:
        stop = first + length
        # A token that holds a part of a character has no text of its own.
        content = "".join(map(visible, pieces[first:stop])) or "\u00b7" * (length > 1)
        slots.append(_Slot(first, stop, content, names[codes[first]], int(shades[first])))
        first = stop
    return slots


def _marked(slots: Sequence[_Slot]) -> Text:
    text = Text()
    for reason, run in itertools.groupby(slots, key=lambda slot: slot.reason if slot.reason in FREE else "protected"):
        content = list(run)
        if reason == "protected":
            text.append("{" + "".join(slot.content for slot in content) + "}", PROTECTED)
        for slot in content if reason in FREE else ():
            text.append(*((f"[{slot.content}]", SHADES[slot.shade]) if reason == "merged" else (slot.content,)))
    return text


def ratio_table(summaries: Sequence[PlanSummary]) -> Table:
    """A row a plan."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("asked", "slots", "tokens/slot", "merged", "kept fine", "protected", "longest", "budget"):
        table.add_column(name, justify="left" if name == "budget" else "right")
    for plan in summaries:
        shares = (plan.merged_tokens, plan.fine_tokens, plan.protected_tokens)
        table.add_row(
            "-" if plan.target_ratio is None else f"{plan.target_ratio:g}",
            f"{plan.slots:,}",
            f"{plan.ratio:.2f}",
            *(f"{100 * share / max(plan.tokens, 1):.1f} %" for share in shares),
            str(plan.longest),
            "met" if plan.budget_met else f"not met ({plan.budget:,})",
        )
    return table


def length_histogram(summary: PlanSummary) -> Text:
    """Slots by their length."""
    size = math.ceil(summary.longest / HISTOGRAM_ROWS) or 1
    bins = [0] * math.ceil(summary.longest / size)
    for length, number in summary.lengths.items():
        bins[math.ceil(length / size) - 1] += number
    lines = []
    for place, number in enumerate(bins):
        name = f"{place * size + 1}-{(place + 1) * size}" if size > 1 else f"{place + 1}"
        full, rest = divmod(max(round(8 * HISTOGRAM_WIDTH * number / max(bins)), 1), 8)
        bar = "█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else "")
        if number:
            lines.append(f"{name:>7} {bar} {number:,}")
    return Text("\n".join(lines))


def along_the_prompt(plan: SpanDetails) -> Text:
    """Mean entropy of the candidate spans in columns of the prompt, and below it the share of tokens kept."""
    entropy, spans = row_of(plan, "entropy", 0), row_of(plan, "span_ids", 0)
    kept = (spans.bincount()[spans] == 1).float()
    columns = min(PLOT_WIDTH, len(spans))
    edges = [len(spans) * column // columns for column in range(columns + 1)]
    pairs = list(itertools.pairwise(edges))
    shares = [float(kept[a:b].mean()) for a, b in pairs]
    density = "".join(DENSITIES[round(share * (len(DENSITIES) - 1))] for share in shares)
    if entropy.isnan().any():
        return Text(f"entropy unknown: this mode asks no encoder\n   kept {density}")
    means = [float(entropy[a:b].mean()) for a, b in pairs]
    highest = max(means)
    bars = "".join(BARS[round(mean / (highest or 1.0) * (len(BARS) - 1))] for mean in means)
    return Text(f"entropy {bars} up to {highest:.3f}\n   kept {density}")


def show_plans(
    console: Console,
    plans: Sequence[SpanDetails],
    pieces: Sequence[str],
    shown: int,
    most_tokens: int,
    notes: Sequence[str] = (),
) -> None:
    """Print everything about one prompt.

    Args:
        console: of rich.
        plans: of the same prompt.
        pieces: text of each of its tokens.
        shown: the plan whose text and plots are printed.
        most_tokens: of the text.
        notes: lines to put below.
    """
    plan, summaries = plans[shown], [summarise(each) for each in plans]
    asked = summaries[shown].target_ratio
    if most_tokens:
        console.print(plan_text(plan, pieces, most_tokens))
        console.print()
        legend = Text("[several tokens in one slot]", SHADES[1])
        legend.append(" stronger: higher entropy", "not bold default on default")
        legend.append("   a slot each   ", "default on default")
        legend.append("{protected or read}", "default on default underline")
        console.print(legend)
        console.print()
    console.print(ratio_table(summaries))
    console.print()
    console.print(Text(f"at {asked:g} tokens per slot" if asked else "at the checkpoint's own thresholds", "bold"))
    console.print(along_the_prompt(plan))
    console.print(Text("slots by length"))
    console.print(length_histogram(summaries[shown]))
    for note in notes:
        console.print(Text(f"note: {note}"))


__all__ = ["length_histogram", "plan_text", "ratio_table", "show_plans", "visible"]
