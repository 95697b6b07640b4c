"""Options of an adaptation that make no sense are refused before anything is trained."""

from __future__ import annotations

import pytest

from semtoken_hf.training.adaptation import adapt, build_trainer, load_student
from semtoken_hf.training.adaptation_arguments import LEARNING_RATES, AdaptationArguments
from tests.training.adaptation_runs import make_inputs, options


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trainable": "head"}, "trainable must be one of"),
        ({"model_dtype": "bfloat16", "trainable": "full"}, "lost in rounding"),
        ({"ratios": [4.0, 2.0]}, "ratios must be two numbers"),
        ({"uncompressed_share": 1.0}, "uncompressed_share must be"),
        ({"weights": ["a.txt=much"]}, "--weights takes NAME=NUMBER"),
        ({"set_fields": ["position_mode"]}, "--set-fields takes NAME=VALUE"),
        ({"evaluation_windows": 0}, "at least 1"),
        ({"objective": "window", "tasks": "often"}, "task schedule"),
        ({"objective": "prefix"}, "objective must be one of"),
        ({"tasks": "fixed"}, "need objective='window'"),
        ({"span_lengths": [0, 2]}, "span_lengths must be numbers >= 1"),
    ],
)
def test_nonsense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        AdaptationArguments("checkpoint", "text", **fields)


def test_uncompressed_steps_need_something_to_train(inputs, tmp_path):
    """Where the uncompressed model cannot change, a step without compression has no gradient."""
    with pytest.raises(ValueError, match="uncompressed_share"):
        adapt(*options(inputs, tmp_path, {"trainable": "lora", "uncompressed_share": 0.25}))


def test_defaults_follow_what_is_trained():
    shares = {t: AdaptationArguments("c", "t", trainable=t).uncompressed_share for t in LEARNING_RATES}
    assert shares == {"merger": 0.0, "lora": 0.0, "full": 0.25}
    assert AdaptationArguments("c", "t", trainable="full", uncompressed_share=0.0).uncompressed_share == 0.0


@pytest.mark.parametrize("trainable", ["merger", "lora", "full"])
def test_learning_rates(inputs, tmp_path, trainable):
    trainer = build_trainer(*options(inputs, tmp_path, {"trainable": trainable, "merger_learning_rate": 0.02}))
    rates = [group["lr"] for group in trainer.create_optimizer().param_groups]
    assert rates == [0.02, LEARNING_RATES[trainable]][: 1 + (trainable != "merger")]
    trainer = build_trainer(*options(inputs, tmp_path, {"trainable": "full"}, learning_rate=0.07))
    assert trainer.create_optimizer().param_groups[1]["lr"] == 0.07


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"context_length": 120}, r"120 \+ target_length 16 exceed the model's 128 positions"),
        ({"objective": "window", "min_context_length": 65}, r"min_context_length \(65\)"),
        ({"sequence_length": 144}, "144 exceeds the model's 128 positions"),
        ({"instructions": 0.5}, "chat template"),
        ({"set_fields": ["merge_mode=mean"]}, "leave merge_mode out"),
        ({"set_fields": ["postion_mode=compact"]}, "postion_mode"),
        ({"weights": ["other.txt=2"]}, "stands for no file"),
    ],
)
def test_what_does_not_fit_is_refused(inputs, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        build_trainer(*options(inputs, tmp_path, fields))


def test_a_folder_without_text(inputs, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no text files"):
        build_trainer(*options(inputs, tmp_path, {"text": str(tmp_path / "empty")}))


def test_the_longest_context_fits_the_model(inputs, tmp_path):
    window = {"objective": "window", "context_length": None}
    trainer = build_trainer(*options(inputs, tmp_path, window))
    assert trainer.windows.shape == (2, 128)
    assert trainer.data_collator.shape.context_length == 112
    trainer = build_trainer(*options(inputs, tmp_path, {"sequence_length": None}))
    assert trainer.data_collator.shape.sequence_length == 128


@pytest.mark.parametrize("mode", ["mean", "representative"])
def test_the_residual_starts_on_what_the_checkpoint_merges_by(tmp_path, mode):
    inputs = make_inputs(tmp_path, merge_mode=mode)
    student = load_student(options(inputs, tmp_path)[0])
    assert (student.config.merge_mode, student.config.merger_base) == ("learned", mode)
    other = load_student(options(inputs, tmp_path, {"set_fields": ["merger_base=mean"]})[0])
    assert other.config.merger_base == "mean"
