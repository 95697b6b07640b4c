"""`semtoken evaluate`: what it says to machines is `metrics.json`; the figures go into a card on request."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from semtoken_hf.evaluation.report.model_index import BEGIN, END
from tests.fixtures.command_line import run_command, run_json
from tests.fixtures.evaluation_data import needs_lm_eval, write_data

pytestmark = needs_lm_eval
CARD = f"---\nlicense: mit\n---\n# Mine\n\n{BEGIN}\n{END}\n\nKept.\n"


@pytest.fixture(scope="module")
def options(tmp_path_factory, semtoken):
    root = tmp_path_factory.mktemp("evaluate")
    lengths = (
        "--context-length",
        "96",
        "--target-length",
        "16",
        "--lengths",
        "0",
        "--ratios",
        "2",
        "--curve-ratios",
        "2",
    )
    few = ("--tasks", "wikitext", "--methods", "full", "none", "semtoken", "--ablations", "none", "--fraction", "0.1")
    return ["--checkpoint", semtoken, "--data-dir", write_data(root / "data"), "--output-dir", root, *lengths, *few]


@pytest.fixture(scope="module")
def record(options):
    return run_json("evaluate", *options)


def test_the_record_is_the_metrics(record):
    folder = Path(record["folder"])
    metrics = json.loads((folder / "metrics.json").read_text())
    assert record["cells"] == metrics["cells"]
    assert {cell["method"] for cell in record["cells"]} == {"full", "none", "semtoken"}
    assert all(Path(record[name]).is_file() for name in ("report", "report_md", "metrics"))


def test_people_get_the_report_and_bars_on_standard_error(record, options):
    done = run_command("evaluate", *options)
    assert done.stdout.splitlines()[-1] == f"report: {record['report']}"
    assert "cells" in done.stderr
    assert "cells" not in done.stdout
    assert "cells" not in run_command("evaluate", *options, "--quiet").stderr


def test_a_plain_checkpoint_is_refused(options, make_llama):
    done = run_command("evaluate", *options, "--checkpoint", make_llama(), code=1)
    assert "error: " in done.stderr.splitlines()[-1]
    assert "`semtoken convert` makes" in done.stderr


def test_figures_go_into_the_card(record, options, semtoken, tmp_path):
    folder = shutil.copytree(semtoken, tmp_path / "mine")
    refused = run_command("evaluate", *options, "--report", "--update-card", folder, code=1).stderr
    assert "holds no card: write a README.md" in refused
    (folder / "README.md").write_text("# Mine\n")
    assert BEGIN in run_command("evaluate", *options, "--report", "--update-card", folder, code=1).stderr
    (folder / "README.md").write_text(CARD)
    updated = run_json("evaluate", *options, "--report", "--update-card", folder)
    assert updated["card"] == str(folder / "README.md")
    text = (folder / "README.md").read_text()
    assert Path(record["report_md"]).read_text().strip() in text
    assert text.endswith("Kept.\n")
    (cell,) = [c for c in record["cells"] if c["method"] == "semtoken"]
    assert str(round(cell["perplexity"], 4)) in text.split("# Mine")[0]
    figures = json.loads((folder / "metrics.json").read_text())
    assert [c["nll"] for c in figures["cells"]] == pytest.approx([c["nll"] for c in record["cells"]], rel=1e-5)
    assert not Path(figures["config"]["data_dir"]).is_absolute()
    linked = {part.split(")")[0] for part in text.split("](plots/")[1:]}
    assert linked == {file.name for file in (folder / "plots").iterdir()}
