"""scripts/measure_encoder_choices.py: the reference agrees with itself, and all columns are filled."""

from __future__ import annotations

import pytest

from tests.fixtures.evaluation_data import EMBEDDED, write_rows
from tests.fixtures.scripts import main_of
from tests.fixtures.text import PROSE

CHOICES = ["bfloat16, all layers", "bfloat16, 1 layers"]


@pytest.fixture
def report(monkeypatch, tmp_path, encoder_folder) -> dict[str, list[str]]:
    """Cells by encoder."""
    text = "Kitty hid the silver teapot in the mill at Lambton. "
    paragraphs = [{"title": "The teapot", "text": text}, *({"title": "Netherfield", "text": PROSE} for _ in range(3))]
    row = {"id": "a", "question": "Where is the teapot?", "answers": ["the mill at Lambton"], "paragraphs": paragraphs}
    write_rows(tmp_path / "hotpotqa.jsonl.xz", [row])
    (tmp_path / "text.txt").write_text(PROSE * 8)
    sizes = {"context": 400, "target": 20, "windows": 2, "tokens": 300, "repetitions": 1}
    paths = {
        "checkpoint": EMBEDDED,
        "encoder": encoder_folder,
        "text_file": tmp_path / "text.txt",
        "data_dir": tmp_path,
    }
    options = [part for name, value in {**sizes, **paths}.items() for part in (f"--{name}", value)]
    output = tmp_path / "choices.md"
    main_of("measure_encoder_choices.py", monkeypatch)(*options, "--choices", *CHOICES, "--output", output)
    lines = [line.strip("| ").split(" | ") for line in output.read_text().splitlines() if line.startswith("| ")]
    return {name: cells for name, *cells in lines}


def test_every_choice_is_measured_against_the_first(report):
    header, whole = report["encoder"], report["float32, all layers"]
    assert list(report) == ["encoder", "float32, all layers", *CHOICES]
    assert all(len(cells) == len(header) for cells in report.values())
    assert (whole[:2], whole[-1]) == (["100.0%", "100.0%"], "1.000")
    assert all(0 < float(cell.rstrip("%")) <= 100 for cell in report["bfloat16, 1 layers"][:2])
