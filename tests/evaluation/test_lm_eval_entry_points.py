"""How lm-eval is entered: `hf` on the code that a checkpoint carries, the command line, and what is refused."""

import json
import sys
from pathlib import Path

import pytest

import semtoken_hf
from tests.fixtures.children import clean_environment, run, run_clean
from tests.fixtures.command_line import run_command
from tests.fixtures.tiny import plain_twin, tiny_model, tiny_tokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
from semtoken_hf.evaluation.lm_eval_model import SemTokenLM
from tests.fixtures.lm_eval_tasks import CONTEXTS, FIELDS, LONG, TASKS, generated, loaded

# The code that the folder carries, where the package cannot be imported.
HF_SCRIPT = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager

folder, tasks, *names = sys.argv[1:]
answers = []
for options in ({}, {"compression": False}):
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": folder, "trust_remote_code": True, **options},
        tasks=names,
        task_manager=TaskManager(include_path=tasks, include_defaults=False),
        device="cpu",
        batch_size=1,
        bootstrap_iters=0,
    )
    answers.append({
        name: [[response[0] for response in sample["resps"]] for sample in results["samples"][name]] for name in names
    })
print("FACTS" + json.dumps(answers))
"""


def as_json(value):
    return json.loads(json.dumps(value))


def test_hf_scores_exactly_as_the_plain_model_where_the_package_is_not_installed(folders, plain, tmp_path):
    default, off = run_clean(HF_SCRIPT, folders / "semtoken", folders / "tasks", *TASKS, home=tmp_path / "home")
    assert off == as_json(plain)
    # Only `generate` compresses on its own: every other request reads all logits.
    assert {name: default[name] for name in TASKS if name != "answers"} == {
        name: as_json(rows) for name, rows in plain.items() if name != "answers"
    }
    model = tiny_model(**FIELDS)
    assert default["answers"] == [[generated(model, context)[0]] for context in CONTEXTS]
    assert all(default["answers"][i] != plain["answers"][i] for i in LONG)


@pytest.mark.slow
def test_the_command_line(folders, evaluate, tmp_path):
    arguments = ["--model", "semtoken", "--model_args", f"pretrained={folders / 'semtoken'},target_ratio=2.0"]
    tasks = ["choices", "answers"]
    arguments += ["--tasks", *tasks, "--include_path", str(folders / "tasks"), "--device", "cpu"]
    arguments += ["--output_path", str(tmp_path / "out.json"), "--log_samples"]
    environment = clean_environment(tmp_path / "home", PYTHONPATH=str(Path(semtoken_hf.__file__).parents[1]))
    command = [sys.executable, "-m", "semtoken_hf.evaluation.lm_eval_model", *arguments]
    child = run(command, environment, cwd=tmp_path)
    (results,) = [json.loads(path.read_text()) for path in tmp_path.glob("out*.json")]
    wanted = evaluate("semtoken", tasks, pretrained=str(folders / "semtoken"), target_ratio=2.0)[0]
    assert sorted(results["results"]) == sorted(tasks)
    for name, metrics in results["results"].items():
        numbers = {metric: value for metric, value in metrics.items() if "stderr" not in metric and "," in metric}
        assert numbers
        assert numbers == {metric: pytest.approx(wanted["results"][name][metric]) for metric in numbers}
    own = wanted["config"]["semtoken"]
    assert results["config"]["semtoken"] == as_json(own)
    read = own["loglikelihood"]
    assert (
        f"SemToken, loglikelihood: {read['compressed']} compressed contexts of {read['tokens']} tokens were read in "
        f"{read['slots']} slots"
    ) in child.stderr
    assert "|choices|" in child.stdout


def test_the_command_hands_on_to_lm_eval(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["semtoken"])
    assert "--include_path" in run_command("lm-eval", "run", "--help").stdout


def test_a_field_out_of_its_range_is_an_error(folders):
    with pytest.raises(ValueError, match=r"`target_ratio` must be a finite number >= 1, got 0\.5"):
        SemTokenLM(pretrained=str(folders / "semtoken"), device="cpu", target_ratio=0.5)


def test_an_unknown_argument_is_an_error_that_names_it(folders):
    with pytest.raises(TypeError, match="'target_ration'"):
        SemTokenLM(pretrained=str(folders / "semtoken"), device="cpu", target_ration=4)


def test_a_plain_checkpoint_is_refused_with_what_to_do(folders):
    for pretrained in (str(folders / "plain"), plain_twin(tiny_model(**FIELDS))):
        with pytest.raises(ValueError, match=r"plain 'llama' checkpoint: convert it .* or evaluate it .*--model hf"):
            SemTokenLM(pretrained=pretrained, tokenizer=tiny_tokenizer(), device="cpu")


def test_fields_beside_a_loaded_model_are_refused():
    with pytest.raises(ValueError, match=r"set \['target_ratio'\] in the configuration of the loaded model"):
        loaded(tiny_model(**FIELDS), target_ratio=4)
