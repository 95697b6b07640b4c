"""Ctrl-C and SIGTERM, really sent, at several moments of every command; and a reader that goes away."""

from __future__ import annotations

import os
import signal

import pytest

from semtoken_hf.conversion import weights
from semtoken_hf.evaluation import cells
from semtoken_hf.evaluation.jobs import read_records
from semtoken_hf.publishing import push
from semtoken_hf.training.adaptation_trainer import AdaptationTrainer
from tests.fixtures.command_line import end_of, run_command, run_json, start_command
from tests.fixtures.evaluation_data import needs_lm_eval, write_data
from tests.training.adaptation_runs import make_inputs

# Which signal, what it ends with, and how the line begins.
SIGNALS = pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)


def interrupting(function, number: int, at: int = 1):
    """`function`, at the end of whose call number `at` this process gets a signal."""
    calls = []

    def call(*args, **kwargs):
        result = function(*args, **kwargs)
        calls.append(args)
        if len(calls) == at:
            os.kill(os.getpid(), number)
        return result

    return call


@SIGNALS
@pytest.mark.parametrize("moment", ["save_file", "split_state_dict_into_shards_factory"])
def test_convert_leaves_nothing(make_llama, encoder_folder, tmp_path, monkeypatch, number, code, word, moment):
    monkeypatch.setattr(weights, moment, interrupting(getattr(weights, moment), number))
    place = tmp_path / "place"
    place.mkdir()
    done = run_command("convert", make_llama(), encoder_folder, place / "out", "--quiet", code=code)
    assert done.stderr == f"{word}; no folder was written; start again\n"
    assert list(place.iterdir()) == []


def test_convert_keeps_what_it_would_have_replaced(make_llama, encoder_folder, tmp_path, monkeypatch):
    out = tmp_path / "place" / "out"
    run_command("convert", make_llama(), encoder_folder, out, "--quiet", "--set", "target_ratio=3")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(weights, "save_file", interrupting(weights.save_file, signal.SIGINT))
    run_command("convert", make_llama(), encoder_folder, out, "--quiet", "--overwrite", code=130)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert list(out.parent.iterdir()) == [out]


@SIGNALS
def test_adapt_goes_on_where_it_was(tmp_path, monkeypatch, number, code, word):
    inputs = make_inputs(tmp_path)
    arguments = ["adapt", "--checkpoint", inputs / "checkpoint", "--text", inputs / "text", "--trainable", "merger"]
    arguments += ["--context-length", "64", "--chunk-length", "16", "--target-length", "16"]
    arguments += ["--held-out-share", "0.3", "--evaluation-windows", "1", "--max-steps", "4", "--save-steps", "1"]
    arguments += ["--bf16", "False", "--use-cpu", "--eval-strategy", "no", "--output-dir", tmp_path / "run", "--quiet"]
    step = AdaptationTrainer.training_step
    with monkeypatch.context() as patch:
        patch.setattr(AdaptationTrainer, "training_step", interrupting(step, number, at=3))
        done = run_command(*arguments, code=code)
    assert done.stderr.splitlines()[-1].startswith(f"{word}; start the same command again to go on")
    kept = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert "checkpoint-2" in kept
    assert not {"model", "writing", "model.tmp"} & set(kept)
    steps = []
    monkeypatch.setattr(AdaptationTrainer, "training_step", lambda *a, **k: steps.append(a) or step(*a, **k))
    run_command(*arguments)
    assert len(steps) == 2
    assert (tmp_path / "run" / "model" / "config.json").exists()


@needs_lm_eval
@SIGNALS
def test_evaluate_reads_only_the_rest(semtoken, tmp_path, monkeypatch, number, code, word):
    few = ("--tasks", "wikitext", "--methods", "full", "--ablations", "none", "--lengths", "0", "--curve-ratios", "2")
    sizes = ("--context-length", "96", "--target-length", "16", "--fraction", "0.2", "--output-dir", tmp_path)
    arguments = ["evaluate", "--checkpoint", semtoken, "--data-dir", write_data(tmp_path / "data"), *few, *sizes]
    read = cells.read_prompt
    with monkeypatch.context() as patch:
        patch.setattr(cells, "read_prompt", interrupting(read, number, at=2))
        done = run_command(*arguments, code=code)
    assert done.stderr.splitlines()[-1] == f"{word}; start the same command again to go on"
    (partial,) = tmp_path.rglob("*.partial")
    assert len(read_records(partial)) == 1
    again = []
    monkeypatch.setattr(cells, "read_prompt", lambda *a, **k: again.append(a) or read(*a, **k))
    record = run_json(*arguments)
    (cell,) = record["cells"]
    assert cell["examples"] == len(again) + 1 > 2


@SIGNALS
def test_push_says_what_is_there(make_checkpoint, hub, monkeypatch, number, code, word):
    monkeypatch.setattr(push.HfApi, "create_repo", interrupting(push.HfApi.create_repo, number))
    done = run_command("push", make_checkpoint(), "me/tiny", code=code)
    assert done.stderr.startswith(f"{word}; the repository holds all of the commit or nothing of it")
    assert hub.repositories["me/tiny"].files("main") == {}


def test_a_child_stops_while_it_writes(semtoken, text_file):
    child = start_command("generate", semtoken, "--file", text_file, "--max-new-tokens", "15000", "--quiet")
    first = child.stdout.read(3)
    child.send_signal(signal.SIGINT)
    code, _, err = end_of(child)
    assert (code, err) == (130, "interrupted; nothing was saved\n")
    assert first


def test_a_child_stops_before_its_command_is_there():
    child = start_command("doctor", PYTHONVERBOSE="1")
    # Its importing of PyTorch has begun.
    while "torch" not in (line := child.stderr.readline()):
        assert line, "ended early"
    child.send_signal(signal.SIGINT)
    code, out, err = end_of(child)
    assert (code, out) == (130, "")
    assert "interrupted; nothing was begun" in err
    assert "Traceback" not in err


def test_a_reader_that_goes_away_ends_it_silently(semtoken):
    child = start_command("push", semtoken, "me/tiny", "--dry-run")
    child.stdout.close()
    err = child.stderr.read()
    assert child.wait(240) == 141
    assert err == ""
