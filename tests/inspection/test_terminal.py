"""A plan in the terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.color import Color
from rich.console import Console
from rich.style import Style

from semtoken_hf.inspection.details import describe
from semtoken_hf.inspection.page import token_pieces
from semtoken_hf.inspection.planning import plan_ratios
from semtoken_hf.inspection.summary import summarise
from semtoken_hf.inspection.terminal import (
    SHADES,
    along_the_prompt,
    plan_text,
    ratio_table,
    show_plans,
    visible,
)
from tests.fixtures.text import PROSE
from tests.fixtures.tiny import random_ids, tiny_model

RATIOS = [1.5, 2.4, 8.0]


@pytest.fixture(scope="module")
def plans(planner, tokenizer):
    return plan_ratios(planner, tokenizer(PROSE, return_tensors="pt"), RATIOS)


@pytest.fixture(scope="module")
def pieces(plans, tokenizer):
    return token_pieces(tokenizer, plans[0].input_ids[0].tolist())


def printed(*content, **options):
    console = Console(file=io.StringIO(), width=100, soft_wrap=True, highlight=False, markup=False, **options)
    for part in content:
        console.print(part)
    return console.file.getvalue()


def test_brackets_say_what_merges_without_any_colour(plans, pieces):
    plan = plans[1]
    text = plan_text(plan, pieces, 10_000).plain
    assert "\x1b" not in printed(text)
    spans, at = plan.span_ids[0].tolist(), 0
    for slot in range(max(spans) + 1):
        content = "".join(pieces[at : at + spans.count(slot)])
        if spans.count(slot) > 1:
            assert f"[{content}]" in text
        at += spans.count(slot)
    assert text.count("[") == sum(number for n, number in summarise(plan).lengths.items() if n > 1)
    inside = "".join(re.findall(r"\{(.*?)\}", text, re.DOTALL))
    protected = (plan.protected_mask | plan.read_mask)[0].tolist()
    assert inside == "".join(piece for piece, whole in zip(pieces, protected, strict=True) if whole)
    assert re.sub(r"[\[\]{}]", "", text) == "".join(pieces)


def test_shades_rise_with_the_entropy(plans, pieces):
    text, plan = plan_text(plans[2], pieces, 10_000), plans[2]
    shades = [SHADES.index(span.style) for span in text.spans if span.style in SHADES]
    spans = plan.span_ids[0]
    entropies = [
        float(plan.entropy[0, spans == slot][0]) for slot in range(int(spans[-1]) + 1) if (spans == slot).sum() > 1
    ]
    assert len(shades) == len(entropies)
    ordered = [shade for _, shade in sorted(zip(entropies, shades, strict=True))]
    assert ordered == sorted(ordered)
    assert len(set(shades)) > 2
    assert "\x1b[" in printed(text, force_terminal=True, color_system="truecolor")


def contrast(style):
    def light(colour: Color) -> float:
        shares = [x / 255 for x in colour.get_truecolor()]
        r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in shares)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    ends = sorted((light(style.color), light(style.bgcolor)))
    return (ends[1] + 0.05) / (ends[0] + 0.05)


def test_shades_can_be_read():
    assert all(contrast(Style.parse(shade)) >= 4.5 for shade in SHADES)


def test_a_long_text_shows_its_start_and_its_end(plans, pieces):
    text = plan_text(plans[1], pieces, 80).plain
    assert text.startswith("{<s>")
    assert text.endswith("}")
    hidden = int(re.search(r"\.\.\. ([\d,]+) tokens more", text)[1])
    assert len(pieces) - 80 <= hidden <= len(pieces) - 80 + 2 * 16
    assert "--max-tokens" not in plan_text(plans[1], pieces, len(pieces)).plain


@pytest.mark.parametrize(
    ("piece", "shown"),
    [
        ("a\x1b[31mb", "a␛[31mb"),
        ("\u202eevil", "\ufffdevil"),
        ("x\r\n\ty", "x␍\n\ty"),
    ],
)
def test_text_cannot_steer_the_terminal(piece, shown):
    assert visible(piece) == shown


def test_everything_about_a_prompt(plans, pieces):
    console = Console(file=io.StringIO(), width=100)
    show_plans(console, plans, pieces, 1, 60, ["a note [bold]"])
    text = console.file.getvalue()
    for plan in plans:
        found = summarise(plan)
        share = f"{100 * found.merged_tokens / found.tokens:.1f} %"
        assert re.search(rf"{found.target_ratio:g} +{found.slots} +{found.ratio:.2f} +{share}", text)
    assert "note: a note [bold]" in text
    assert "at 2.4 tokens per slot" in text
    entropy, kept = re.search(r"entropy (.+) up to 0\.\d{3}\n +kept (.*)", text).groups()
    assert len(entropy) == 64
    assert "█" in kept
    figures = Console(file=io.StringIO(), width=100)
    show_plans(figures, plans, pieces, 1, 0)
    assert "[" not in figures.file.getvalue()


def test_the_table_says_what_is_not_met(planner, tokenizer):
    plan = plan_ratios(planner, tokenizer(PROSE, return_tensors="pt"), [200.0])[0]
    found = summarise(plan)
    assert not found.budget_met
    assert f"not met ({found.budget})" in printed(ratio_table([found]))


def test_an_entropy_that_nobody_measured_is_not_zero():
    plan = describe(tiny_model(segmentation_mode="uniform").compress(random_ids(1, 96)).origin)
    text = along_the_prompt(plan).plain
    assert "entropy unknown" in text
    assert re.search("kept [ ░▒▓█]{64}", text)
    assert not re.search(r"up to \d", text)
