"""The scripts that measure adaptation, on a tiny checkpoint and a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fixtures.children import run_script
from tests.fixtures.text import PROSE
from tests.fixtures.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with a converted checkpoint, a text to adapt on and one to measure on."""
    folder = tmp_path_factory.mktemp("inputs")
    model = tiny_model(initializer_range=0.05)
    model.save_pretrained(folder / "semtoken")
    tiny_tokenizer().save_pretrained(folder / "semtoken")
    (folder / "corpus").mkdir()
    documents = [PROSE.replace("Bennet", f"Bennet{i}") for i in range(30)]
    (folder / "corpus" / "novels.txt").write_text("\n\n\n".join(documents))
    (folder / "test.txt").write_text(PROSE)
    return folder


def costs_of(report: str) -> dict[str, str]:
    rows = [line.split(" | ") for line in report.splitlines() if line.startswith("| ")]
    return {row[0].removeprefix("| "): row[1].removesuffix(" |") for row in rows}


def test_the_table_of_adapted_checkpoints(inputs: Path, tmp_path: Path) -> None:
    report = run_script(
        "measure_adaptation.py",
        *("--checkpoint", inputs / "semtoken", "--adapted", f"merger only={inputs / 'semtoken'}"),
        *("--text-file", inputs / "test.txt", "--held-out", inputs / "corpus" / "novels.txt"),
        *("--held-out-share", "0.2", "--ratios", "2.4", "--context", "64", "--target", "16", "--windows", "2"),
        *("--output", tmp_path / "adaptation.md"),
    ).stdout
    assert report.count("| full context | 1.00 |") == 2
    tables = report.split("## ")[1:]
    for table in tables:
        costs = costs_of(table)
        assert {"random dropping", "truncation (first + last)", "uniform spans, untrained"} <= costs.keys()
        rows = {line.split(" | ")[0]: line.split(" | ")[1:] for line in table.splitlines() if line.startswith("| ")}
        # The same weights under another name give the same row.
        assert rows["| merger only"] == rows["| SemToken, untrained"]
