"""A killed adaptation goes on where it was, or says why it cannot."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from semtoken_hf.training import adaptation
from semtoken_hf.training.adaptation import adapt
from tests.training.adaptation_runs import curve, make_inputs, options


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


class Killed(Exception):
    pass


class Kill(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def kill_at(monkeypatch, step):
    """The next run dies behind `step`."""
    build = adaptation.build_trainer

    def build_and_kill(*arguments):
        trainer = build(*arguments)
        trainer.add_callback(Kill(step))
        return trainer

    monkeypatch.setattr(adaptation, "build_trainer", build_and_kill)


def all_weights(folder):
    return {f"{p.parent.name}/{n}": t for p in folder.rglob("*.safetensors") for n, t in load_file(p).items()}


def assert_same_weights(ours, theirs):
    ours, theirs = all_weights(ours), all_weights(theirs)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6)


def checkpoints(output_dir):
    return sorted(p.name for p in output_dir.glob("checkpoint-*"))


@pytest.mark.parametrize("objective", [{"merger_only_share": 0.25}, {"objective": "window", "tasks": "diminish"}])
@pytest.mark.parametrize("trainable", ["merger", "lora", "full"])
def test_a_killed_run_ends_with_the_same_weights(inputs, tmp_path, monkeypatch, trainable, objective):
    arguments = {"trainable": trainable, "count_flops": True, **objective}
    whole = adapt(*options(inputs, tmp_path / "whole", arguments))
    broken = options(inputs, tmp_path / "broken", arguments)
    with monkeypatch.context() as patch:
        kill_at(patch, 6)
        with pytest.raises(Killed):
            adapt(*broken)
    assert checkpoints(tmp_path / "broken") == ["checkpoint-4"]
    assert not (tmp_path / "broken" / "model").exists()
    resumed = adapt(*broken)
    assert_same_weights(resumed, whole)
    rows, expected = curve(tmp_path / "broken"), curve(tmp_path / "whole")
    assert [row["step"] for row in rows] == [0, 4, 8]
    for ours, theirs in zip(rows, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_checkpoint_holds_what_was_trained_and_no_more(inputs, tmp_path):
    adapt(*options(inputs, tmp_path, {"trainable": "lora"}))
    assert checkpoints(tmp_path) == ["checkpoint-8"]
    names = set(load_file(tmp_path / "checkpoint-8" / "trained.safetensors"))
    assert names
    assert all(".lora_" in name or "learned_merger" in name for name in names)
    assert not list((tmp_path / "checkpoint-8").glob("model*"))


def test_a_finished_run_is_finished(inputs, tmp_path):
    first = all_weights(adapt(*options(inputs, tmp_path)))
    again = all_weights(adapt(*options(inputs, tmp_path)))
    assert first.keys() == again.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


def test_a_kill_while_a_checkpoint_is_written(inputs, tmp_path, monkeypatch):
    whole = adapt(*options(inputs, tmp_path / "whole"))
    save = Trainer._save_optimizer_and_scheduler

    def save_half(self, output_dir, *arguments):
        if output_dir.endswith("checkpoint-8"):
            raise Killed
        return save(self, output_dir, *arguments)

    broken = options(inputs, tmp_path / "broken")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_optimizer_and_scheduler", save_half)
        with pytest.raises(Killed):
            adapt(*broken)
    assert checkpoints(tmp_path / "broken") == ["checkpoint-4"]
    # Only SIGKILL leaves it.
    assert not (tmp_path / "broken" / "writing").exists()
    assert_same_weights(adapt(*broken), whole)
    assert checkpoints(tmp_path / "broken") == ["checkpoint-8"]


def test_half_a_checkpoint_is_never_taken_for_a_whole_one(inputs, tmp_path):
    """What a kill left in `writing` stays there, whatever is saved later, at whatever step."""
    half = tmp_path / "writing" / "checkpoint-99"
    half.mkdir(parents=True)
    (half / "trained.safetensors").write_bytes(b"half")
    (tmp_path / "model.tmp").mkdir()
    (tmp_path / "model.tmp" / "half.txt").write_text("half")
    folder = adapt(*options(inputs, tmp_path))
    assert checkpoints(tmp_path) == ["checkpoint-8"]
    assert not (folder / "half.txt").exists()
    assert adapt(*options(inputs, tmp_path)) == folder


@pytest.mark.parametrize(
    ("arguments", "training", "name"),
    [
        ({"ratios": [2.0, 5.0]}, {}, "ratios"),
        ({"trainable": "lora"}, {}, "trainable"),
        ({"objective": "window", "tasks": "fixed"}, {}, "tasks"),
        ({"span_lengths": [2]}, {}, "span_lengths"),
        ({"set_fields": ["position_mode=compact"]}, {}, "set_fields"),
        ({}, {"max_steps": 9}, "max_steps"),
        ({}, {"seed": 1}, "seed"),
        ({}, {"learning_rate": 1.0}, "learning_rate"),
        ({}, {"gradient_accumulation_steps": 2}, "batch"),
    ],
)
def test_other_options_are_refused(inputs, once, arguments, training, name):
    with pytest.raises(ValueError, match=rf"holds a run with other \[.*'{name}'.*another output_dir"):
        adapt(*options(inputs, once, arguments, **training))


@pytest.fixture(scope="module")
def once(inputs, tmp_path_factory):
    """A finished run."""
    output_dir = tmp_path_factory.mktemp("once")
    adapt(*options(inputs, output_dir, max_steps=2, save_steps=1, eval_strategy="no"))
    return output_dir


def test_what_does_not_change_the_weights_may_change(inputs, once):
    training = {"max_steps": 2, "eval_strategy": "no", "logging_steps": 5}
    adapt(*options(inputs, once, {"evaluation_windows": 1, "count_flops": True}, **training))


def test_checkpoints_of_other_parameters_are_refused(inputs, tmp_path):
    adapt(*options(inputs, tmp_path, max_steps=1, save_steps=1, eval_strategy="no"))
    (tmp_path / "adaptation.json").unlink()
    with pytest.raises(ValueError, match="trains other parameters"):
        adapt(*options(inputs, tmp_path, {"trainable": "lora"}, max_steps=2, eval_strategy="no"))
