"""A killed adaptation goes on where it was, or says why it cannot."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

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


@pytest.mark.parametrize(
    ("trainable", "objective"),
    [
        ("merger", {"objective": "window", "tasks": "diminish"}),
        ("lora", {"merger_only_share": 0.25}),
        ("full", {"objective": "window", "tasks": "diminish"}),
    ],
)
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


@pytest.mark.parametrize(
    ("arguments", "training", "name"),
    [
        ({"ratios": [2.0, 5.0]}, {}, "ratios"),
        ({"set_fields": ["position_mode=compact"]}, {}, "set_fields"),
        ({}, {"max_steps": 9}, "max_steps"),
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
