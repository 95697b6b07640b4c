"""scripts/measure_answer_tokens.py: the question's say shows in what share of the answer's tokens stays whole."""

from __future__ import annotations

import re

import pytest

from tests.fixtures.children import run_script
from tests.fixtures.evaluation_data import EMBEDDED, write_rows
from tests.fixtures.text import PROSE


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> str:
    """Two questions whose words stand next to their answers, early in a long text about something else."""
    folder = tmp_path_factory.mktemp("answers")
    fact = "The silver teapot of Kitty's grandmother is hidden below the staircase of the mill at Lambton. "
    paragraphs = [
        {"title": "Netherfield", "text": PROSE},
        {"title": "The teapot", "text": fact},
        *({"title": "Netherfield", "text": PROSE} for _ in range(3)),
    ]
    question = "Where is the silver teapot of Kitty's grandmother hidden?"
    rows = [
        {"id": f"{i}", "question": question, "answers": ["the mill at Lambton"], "paragraphs": paragraphs} for i in "ab"
    ]
    write_rows(folder / "hotpotqa.jsonl.xz", [*rows, {**rows[0], "id": "c", "answers": ["yes"]}])
    output = folder / "answer_tokens.md"
    paths = ("--checkpoints", f"static={EMBEDDED}", "--data_dir", folder, "--output", output)
    run_script("measure_answer_tokens.py", *paths)
    return output.read_text()


def shares_of(report: str, budget: str) -> list[tuple[float, ...]]:
    """At each ratio: answer's share, context's share (in %), tokens per slot."""
    (line,) = [line for line in report.splitlines() if line.startswith(f"| static | {budget} |")]
    found = re.findall(r"([\d.]+)% \(([\d.]+)%; ([\d.]+) x\)", line)
    return [tuple(map(float, cell)) for cell in found]


def test_the_question_keeps_more_of_the_answer(report):
    assert "2 questions whose answer stands in the context" in report
    for budget in ("", "the paper's budget, "):
        without, marked = (shares_of(report, budget + plan) for plan in ("no question", "marked question, weight 1"))
        for (before, share, ratio), (after, new_share, new_ratio) in zip(without, marked, strict=True):
            assert after > before
            assert abs(share - new_share) < 5
            assert ratio == new_ratio
        assert [ratio for *_, ratio in marked] == pytest.approx([2.4, 4.0], abs=0.02)
