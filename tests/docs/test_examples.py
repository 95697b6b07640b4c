"""Every example runs as a program, on the embedded checkpoint and on another, and shows what it says it shows."""

from __future__ import annotations

import re
import runpy
import sys

import pytest
from transformers.utils import logging

from tests.fixtures import children
from tests.fixtures.children import ROOT
from tests.fixtures.evaluation_data import EMBEDDED

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """A function of an example's name and arguments: what it prints."""
    verbosity = logging.get_verbosity()

    def run(name, checkpoint=EMBEDDED):
        path = ROOT / "examples" / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), "--checkpoint", str(checkpoint)])
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    yield run
    logging.set_verbosity(verbosity)


def numbers(pattern, text):
    """The numbers that a pattern's groups find, one tuple for each match."""
    found = re.findall(pattern, text)
    return [tuple(float(n.replace(",", "")) for n in (m if isinstance(m, tuple) else (m,))) for m in found]


def test_document_qa(run):
    printed = run("document_qa")
    losses = numbers(r"(\d+\.\d+) nats per token of the answer", printed)
    means = numbers(r"(?m)^  (?:plain|the latest|SemToken) +(\d+\.\d+)$", printed)
    assert len(losses) == 9
    for way, (mean,) in enumerate(means):
        assert mean == pytest.approx(sum(loss for (loss,) in losses[way::3]) / 3, abs=0.01)
    assert len(means) == 3
    # The first question keeps its answer whole, which makes it likelier; the latest sentences leave it merged.
    merged, whole = re.findall(r"\.\.\.(.+)\.\.\.", printed.split("\n\n")[0])
    assert "the Junior Carlton" in merged
    assert "| the| J|un|ior| Car|l|ton|" in whole
    assert losses[2] < losses[1]


def test_chat(run):
    printed = run("chat")
    turns = numbers(r"([\d,]+) tokens in ([\d,]+) slots \((\d\.\d+)x\), ([\d,]+) bytes", printed)
    assert len(turns) == 3
    assert printed.count("assistant:") == 3
    per_slot = {size / slots for _, slots, _, size in turns}
    assert len(per_slot) == 1  # the cache holds slots and nothing else
    (_, second), (_, third) = [(slots, tokens - slots) for tokens, slots, *_ in turns[1:]]
    assert second == third  # the last turn is short and stays whole, and nothing before it is read again
    assert all(ratio > 2 for _, _, ratio, _ in turns)


def test_rag(run):
    printed = run("rag")
    found = re.findall(r"(?m)^(\w+) +(\d+)" + r" +(\d+) slots" * 2, printed)
    rows = {title: tuple(map(int, counts)) for title, *counts in found}
    assert len(rows) == 7
    # Without the question the last passage keeps most slots; with it, the one that answers.
    titles = [title for title in rows if title != "together"]
    assert max(titles, key=lambda title: rows[title][1]) == titles[-1] == "Maps"
    assert rows["Lighthouses"][1] < rows["Lighthouses"][2]
    for column, total in enumerate(rows.pop("together")):
        assert total == sum(row[column] for row in rows.values())
    assert re.search(r"(?m)^plain: .*\n(?s:.*)^SemToken: ", printed)


def test_batch_answers(run):
    printed = run("batch_answers")
    rows = numbers(r"(?m)^ *([\d,]+) tokens: .+\n *([\d,]+) slots: ", printed)
    assert len(rows) == 4
    assert all(slots < tokens for tokens, slots in rows)
    ((plain,),) = numbers(r"plain and padded: +([\d,]+) bytes", printed)
    ((held,),) = numbers(r"without padding: +([\d,]+) bytes", printed)
    assert held < plain / 3


@pytest.mark.parametrize("example", [path.stem for path in EXAMPLES])
def test_another_checkpoint(example, run):
    assert run(example, "my-semtoken")


def test_the_planner_of_the_loader_runs_in_workers(folder):
    """Workers are other processes: they import the example again."""
    options = ["--checkpoint", "my-semtoken", "--workers", "1", "--max-new-tokens", "1"]
    command = [sys.executable, ROOT / "examples" / "batch_answers.py", *options]
    assert children.run(command, children.environment(), cwd=folder).stdout.count(" slots: ") == 4
