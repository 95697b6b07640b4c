"""`semtoken adapt`: a run by its options, the curve it reports, and mistakes that end with one line."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from semtoken_hf.training.adaptation_curve import read_curve
from tests.fixtures.command_line import run_command, run_json
from tests.training.adaptation_runs import make_inputs

LENGTHS = ("--context-length", "64", "--chunk-length", "16", "--target-length", "16", "--span-lengths", "1", "4")
TRAINING = (
    *("--max-steps", "2", "--per-device-train-batch-size", "2", "--eval-steps", "1", "--save-steps", "1"),
    *("--bf16", "False", "--use_cpu", "--warmup_steps=1"),
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def arguments(inputs, tmp_path):
    paths = ("--checkpoint", inputs / "checkpoint", "--text", inputs / "text", "--output-dir", tmp_path / "run")
    shares = ("--held-out-share", "0.3", "--evaluation-windows", "1", "--trainable", "merger")
    return ["adapt", *paths, *shares, *LENGTHS, *TRAINING]


def test_a_run(arguments, tmp_path):
    record = run_json(*arguments, "--set-fields", "position_mode=compact", "--weights", "novel=1.5")
    folder = tmp_path / "run" / "model"
    assert (record["folder"], record["output_dir"]) == (str(folder), str(tmp_path / "run"))
    assert record["curve"] == read_curve(tmp_path / "run")
    assert [row["step"] for row in record["curve"]] == [0, 1, 2]
    config = AutoModelForCausalLM.from_pretrained(folder).config
    assert (config.adapted_for["trainable"], config.position_mode, config.adapted_for["steps"]) == (
        "merger",
        "compact",
        2,
    )


def test_bars_and_logs_leave_the_path_as_the_last_line(arguments, tmp_path):
    done = run_command(*arguments)
    assert done.stdout.splitlines()[-1] == str(tmp_path / "run" / "model")
    assert "2/2" in done.stderr
    assert "2/2" not in done.stdout
    again = run_command(*arguments, "--quiet")
    assert "2/2" not in again.stderr


@pytest.mark.parametrize(
    ("changed", "code", "message"),
    [
        (["--ratios", "2"], 2, "error: ratios must be two numbers"),
        (["--max-stps", "3"], 2, "error: there is no option --max-stps"),
        (["--max-steps", "few"], 2, "error: argument --max-steps"),
        (["--load-best-model-at-end", "True"], 2, "error: "),
        (["--set-fields", "compact"], 2, "error: --set-fields takes NAME=VALUE"),
        (["--weights", "novel.txt=much"], 2, "error: --weights takes NAME=NUMBER"),
        (["--weights", "nowel=2", "--checkpoint", "/nowhere"], 1, "'nowel', which stands for no file"),
        (["--text", "/nowhere"], 1, "error: "),
        (["--context-length", "4096"], 1, "exceed the model's 128 positions"),
    ],
)
def test_mistakes_end_with_one_line(arguments, changed, code, message):
    done = run_command(*arguments, *changed, code=code)
    lines = done.stderr.splitlines()
    assert message in lines[-1]
    assert [line for line in lines if "error: " in line] == lines[-1:]


def test_a_plain_checkpoint_is_refused(arguments, make_llama):
    done = run_command(*arguments, "--checkpoint", make_llama(), code=1)
    assert "`semtoken convert` makes" in done.stderr.splitlines()[-1]


def test_another_run_in_the_same_folder_is_refused(arguments):
    run_command(*arguments, "--quiet")
    assert "holds a run with other ['seed']" in run_command(*arguments, "--seed", "1", code=1).stderr
