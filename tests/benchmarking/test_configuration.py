import json

import pytest

from semtoken_hf.benchmarking.benchmark import benchmark
from tests.fixtures.command_line import run_command, run_json


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shapes": ["7t"]}, "no model shape '7t'; there are tiny, 160m"),
        ({"lengths": [7], "batches": ["skewed"]}, r"7 tokens leaves rows of \[7, 0, 0, 0\]"),
        ({"ratios": [1.0]}, "--ratios"),
        ({"overrides": ["nonsense=1"]}, "--overrides does not know"),
        ({"overrides": ["segmentation_mode=sharp"]}, "segmentation_mode"),
        ({"report": True}, "nothing is measured yet"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(config_of, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        benchmark(config_of(tmp_path, **fields))


def test_a_missing_text(config_of, tmp_path):
    with pytest.raises(FileNotFoundError, match="--text-file"):
        benchmark(config_of(tmp_path, text_file=str(tmp_path / "none.txt")))


def test_the_command_line(measured):
    folder, _ = measured
    shown = run_command("benchmark", "--report", "--output-dir", folder, "--lengths", 256, 512).stdout
    assert shown == f"report: {folder / 'benchmark.md'}\n"
    record = run_json("benchmark", "--report", "--output-dir", folder)
    assert record["results"] == json.loads((folder / "benchmark.json").read_text())
    assert (record["folder"], record["plot"]) == (str(folder), str(folder / "speed.png"))
    assert "error: there is no model shape 'x'" in run_command("benchmark", "--shapes", "x", code=2).stderr
