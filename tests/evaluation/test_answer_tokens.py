"""scripts/measure_answer_tokens.py: the question's say shows in what share of the answer's tokens stays whole."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.evaluation_data import EMBEDDED, write_rows
from tests.fixtures.text import PROSE

ROOT = Path(__file__).resolve().parents[2]


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
    command = [
        *(sys.executable, ROOT / "scripts" / "measure_answer_tokens.py", "--checkpoints", f"static={EMBEDDED}"),
        *("--data_dir", folder, "--output", output),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
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
