"""An evaluation of the checkpoint that ships: a task of each kind, every method and ablation, on small data.

The report has tests of its own.
"""

import json
import math

import pytest
from filelock import FileLock
from transformers import AutoModelForCausalLM

from semtoken_hf import SemTokenLlamaConfig, SemTokenLlamaForCausalLM
from semtoken_hf.evaluation import cells, evaluate
from semtoken_hf.evaluation.ablations import ABLATIONS
from semtoken_hf.evaluation.cells import list_cells, why_not
from semtoken_hf.evaluation.configuration import EvaluationConfig
from semtoken_hf.evaluation.jobs import read_records
from semtoken_hf.evaluation.methods import METHODS
from semtoken_hf.evaluation.option_names import dashed
from semtoken_hf.evaluation.tasks import TASKS
from tests.fixtures.command_line import run_command
from tests.fixtures.evaluation_data import EMBEDDED, needs_lm_eval, write_data
from tests.fixtures.tiny import BERT

pytestmark = needs_lm_eval
LENGTH = 256
EVALUATED = ["wikitext", "hotpotqa", "longbench", "needle"]
SMALL = {
    "tasks": EVALUATED,
    "ratios": [2.0],
    "curve_ratios": [2.0],
    "context_length": 96,
    "target_length": 16,
    "max_new_tokens": 4,
    "fraction": 0.1,
    "task_fractions": ["needle=0.2"],
    "lengths": [LENGTH],
}


def arguments_of(**fields):
    """The command line of these fields."""
    arguments = []
    for name, value in fields.items():
        arguments += [dashed(f"--{name}"), *map(str, value if isinstance(value, list) else [value])]
    return arguments


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    """A second checkpoint, whose encoder reads windows, beside the one that ships."""
    folder = tmp_path_factory.mktemp("evaluation")
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED)
    own = json.loads((EMBEDDED / "config.json").read_text())
    encoder = {**BERT, "max_position_embeddings": 256}
    other = SemTokenLlamaForCausalLM(SemTokenLlamaConfig(**{**own, "encoder_config": encoder, "auto_map": None}))
    # All but what depends on the encoder.
    shared = {k: v for k, v in model.state_dict().items() if "semantic_encoder" not in k and "state_proj" not in k}
    other.load_state_dict(shared, strict=False)
    other.save_pretrained(folder / "bert")
    paths = {"checkpoint": str(EMBEDDED), "data_dir": str(write_data(folder / "data")), "output_dir": str(folder)}
    return {**paths, "checkpoints": [f"bert={folder / 'bert'}"], **SMALL}


@pytest.fixture(scope="module")
def evaluated(fields):
    """The configuration, what was printed, and what the report was given."""
    given = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "write_report", lambda metrics, folder: given.append((metrics, folder)))
        printed = run_command("evaluate", *arguments_of(**fields)).stdout.splitlines()
    return EvaluationConfig(**fields), printed, given


@pytest.fixture
def no_measuring(monkeypatch):
    """Whatever reads a prompt fails."""

    def fail(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(cells, "read_prompt", fail)
    monkeypatch.setattr(evaluate, "measure_speed", fail)
    monkeypatch.setattr(evaluate, "measure_long_contexts", lambda _: [])


@pytest.fixture
def reports(monkeypatch):
    given = []
    monkeypatch.setattr(evaluate, "write_report", lambda metrics, folder: given.append(metrics))
    return given


def comparable(metrics):
    """Without the command and its options, which differ."""
    return {name: metrics[name] for name in ("cells", "speed", "long_contexts", "alarms")}


def test_every_cell_is_measured_or_left_out_aloud(evaluated):
    config, printed, _ = evaluated
    found = list_cells(config)
    done = [cell for cell in found if why_not(config, cell) is None]
    assert {cell.task for cell in done} == set(EVALUATED)
    assert {cell.ablation for cell in done} == {None, *ABLATIONS}
    assert {cell.checkpoint for cell in done} == {None, "bert"}
    assert {cell.method for cell in done if not cell.ablation} >= set(METHODS) - {
        "semtoken_learned",
        "semtoken_original",
    }
    for cell in found:
        assert cell.path(config.folder).exists() == (cell in done)
        if cell not in done:
            assert any(line.startswith("left out") and why_not(config, cell) in line for line in printed)
    files = [*(config.folder / "cells").rglob("*.*"), *(config.folder / "ablations").rglob("*.*")]
    assert {file for file in files if file.is_file()} == {cell.path(config.folder) for cell in done}
    assert printed[-1] == f"report: {config.folder / 'report.html'}"


@pytest.mark.parametrize("name", EVALUATED)
def test_every_method_reads_the_same_examples(evaluated, name):
    config, task = evaluated[0], TASKS[name]
    done = [c for c in list_cells(config) if c.task == name and not c.ablation and why_not(config, c) is None]
    read = {cell: read_records(cell.path(config.folder)) for cell in done}
    assert len({tuple(record["id"] for record in records) for records in read.values()}) == 1
    for cell, records in read.items():
        for record in records:
            assert record["question_kept"]
            assert 0 < record["slots"] <= record["tokens"]
            assert record["kv_bytes"] == record["slots"] * 2 * 6 * 2 * 64 * 4
            assert 0 < record["nll"] < 20 * record["scored"]
            assert ("answer" in record) == ("score" in record) == (not task.is_perplexity)
            assert 0 <= record.get("score", 0) <= 100
        if cell.method == "full":
            assert all(record["slots"] == record["tokens"] for record in records)


def test_metrics_are_complete(evaluated):
    config, _, given = evaluated
    metrics = json.loads((config.folder / "metrics.json").read_text())
    assert len(given) == 1
    assert given[0] == (metrics, config.folder)
    done = [cell for cell in list_cells(config) if why_not(config, cell) is None]
    named = [(c["task"], c["method"], c["ratio"], c["checkpoint"], c["ablation"]) for c in metrics["cells"]]
    assert named == [(c.task, c.method, c.ratio, c.checkpoint, c.ablation) for c in done]
    # Of a prompt that is protected from end to end, no context is the full context, and there is nothing to gain.
    whole = {cell["task"] for cell in metrics["cells"] if cell["method"] == "none" and cell["tokens_per_slot"] == 1}
    assert len(whole) < len(EVALUATED) / 2
    for cell in metrics["cells"]:
        figures = [cell[name] for name in ("nll", "cost", "kv_share", "kv_bytes")]
        assert all(math.isfinite(figure) for figure in figures)
        assert (cell["gain_kept"] is None) == (cell["task"] in whole)
        assert (cell["score"] is None) == TASKS[cell["task"]].is_perplexity
        assert cell["question_kept"]
        if cell["method"] == "full":
            assert (cell["cost"], cell["kv_share"], cell["tokens_per_slot"]) == (0, 1, 1)
    text = {c["method"]: c["perplexity"] for c in metrics["cells"] if c["task"] == "wikitext" and not c["ablation"]}
    # The weights are the trained ones: at random, it would be 8192.
    assert all(perplexity < 200 for perplexity in text.values())
    assert json.loads((config.folder / "config.json").read_text()) == metrics["config"]


def test_speed_is_measured_for_every_way(evaluated):
    config, _, given = evaluated
    speed = given[0][0]["speed"]
    variants = [(row["method"], row["checkpoint"], row["ratio"], row["length"]) for row in speed]
    assert len(set(variants)) == len(variants)
    # Those that are the checkpoint's own way to read under another name are left out.
    unfit = {cell.method for cell in list_cells(config) if not cell.ablation and why_not(config, cell) is not None}
    assert {row[0] for row in variants} == METHODS.keys() - unfit
    assert ("semtoken", "bert", 2.0, LENGTH) in variants
    for row in speed:
        if row["method"] != "none":
            assert row["slots"] == (LENGTH if row["ratio"] is None else LENGTH / row["ratio"])
        assert row["kv_bytes"] == row["slots"] * 2 * 6 * 2 * 64 * 4
        assert 0 < row["encoder_ms"] + row["decode_ms"] < row["prefill_ms"] + row["end_to_end_ms"]
        # A learned merger reads fingerprints, whatever makes the spans.
        assert (row["encoder_ms"] > 0) == row["method"].startswith(("semtoken", "uniform"))
        assert row["encoder_share"] == pytest.approx(row["encoder_ms"] / row["end_to_end_ms"])
        assert row["repetitions"] == 5
    assert json.loads((config.folder / "speed.json").read_text())["records"] == speed


def test_a_second_run_measures_nothing(evaluated, fields, no_measuring, reports):
    run_command("evaluate", *arguments_of(**fields))
    assert comparable(reports[0]) == comparable(evaluated[2][0][0])


def test_the_report_alone_measures_nothing(evaluated, fields, no_measuring, reports, monkeypatch):
    monkeypatch.setattr(evaluate, "run_cells", None)
    run_command("evaluate", *arguments_of(**fields), "--report")
    assert comparable(reports[0]) == comparable(evaluated[2][0][0])
    # Of some tasks and methods, a part.
    some = {**fields, "tasks": ["wikitext"], "methods": ["full", "semtoken"], "ablations": ["span"]}
    run_command("evaluate", *arguments_of(**some), "--report")
    assert {c["method"] for c in reports[1]["cells"]} == {"full", "semtoken", *ABLATIONS["span"]}


@pytest.mark.parametrize("other", [{"lengths": [64, 128]}, {"ratios": [3.0]}])
def test_other_lengths_and_ratios_are_measured_again(fields, tmp_path, monkeypatch, reports, other):
    measured = []
    few = {**fields, "output_dir": str(tmp_path), "tasks": ["wikitext"], "methods": ["full"], "ablations": ["none"]}
    monkeypatch.setattr(evaluate, "run_cells", lambda *_: None)
    monkeypatch.setattr(evaluate, "measure_long_contexts", lambda _: [])
    monkeypatch.setattr(
        evaluate,
        "measure_speed",
        lambda config: measured.append(config) or [{"length": n, "encoder_share": 0} for n in config.lengths],
    )
    for wanted in (few, {**few, **other}, {**few, **other}):
        run_command("evaluate", *arguments_of(**wanted))
    assert [(config.lengths, config.ratios) for config in measured] == [
        ([LENGTH], [2.0]),
        (other.get("lengths", [LENGTH]), other.get("ratios", [2.0])),
    ]
    assert [row["length"] for row in reports[-1]["speed"]] == other.get("lengths", [LENGTH])


def test_without_data_there_is_nothing_to_evaluate(fields, tmp_path):
    nowhere = {"data_dir": str(tmp_path), "output_dir": str(tmp_path), "tasks": ["wikitext", "qmsum"]}
    done = run_command("evaluate", *arguments_of(**{**fields, **nowhere}), code=1)
    assert "error: nothing to evaluate: no task has data. Pass --data-dir, or --sources" in done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("left out")]
    assert len(lines) == 2
    for task, file in (("wikitext", "wikitext-103/test.txt"), ("qmsum", "qmsum.jsonl.xz")):
        assert any(task in line and f": no data: {file} is not in --data-dir" in line for line in lines)


@pytest.mark.parametrize(
    ("changed", "code", "message"),
    [
        ({"sources": ["qmsum=missing.jsonl"]}, 1, "error: there is no file missing.jsonl"),
        ({"fraction": 2.0}, 2, "error: --fraction must be in"),
        ({"data_dir": "nowhere"}, 2, "error: --data-dir must be a folder, and there is none at nowhere"),
    ],
)
def test_mistakes_end_with_one_line(fields, tmp_path, changed, code, message):
    few = {"output_dir": str(tmp_path), "tasks": ["qmsum"], "methods": ["full"], "lengths": [8]}
    lines = run_command("evaluate", *arguments_of(**{**fields, **few, **changed}), code=code).stderr.splitlines()
    assert [line for line in lines if line.startswith("error")] == [lines[-1]]
    assert lines[-1].startswith(message)


def test_two_evaluations_of_one_folder_do_not_mix(evaluated, fields, no_measuring, reports):
    with FileLock(evaluated[0].folder / ".lock"):
        done = run_command("evaluate", *arguments_of(**fields), code=1)
    assert f"error: another evaluation is running in {evaluated[0].folder}" in done.stderr
    run_command("evaluate", *arguments_of(**fields))
    assert len(reports) == 1
