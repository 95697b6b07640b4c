"""A few real steps of adaptation: what they change, what they leave alone, and what they write."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from semtoken_hf.adapter_semtoken import has_adapter
from semtoken_hf.training.adaptation import adapt, build_trainer
from semtoken_hf.training.adaptation_arguments import AdaptationTrainingArguments
from semtoken_hf.training.adapted_parts import apply_parts, extract_parts
from tests.fixtures.children import run_script
from tests.fixtures.tiny import random_ids
from tests.training.adaptation_runs import OPTIONS, curve, make_inputs, options

STEPS = 32


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module", params=["merger", "lora", "full"])
def run(request, inputs, tmp_path_factory):
    """What was trained, and the folder that a run of each kind left."""
    output_dir = tmp_path_factory.mktemp(request.param)
    training = {"max_steps": STEPS, "eval_steps": STEPS, "save_steps": 100, "per_device_train_batch_size": 4}
    folder = adapt(*options(inputs, output_dir, {"trainable": request.param}, **training))
    assert folder == output_dir / "model"
    return request.param, output_dir


def weights(folder):
    return load_file(folder / "model.safetensors")


def is_merger(name):
    return "learned_merger" in name


def loaded(folder, **arguments):
    return AutoModelForCausalLM.from_pretrained(folder, **arguments).requires_grad_(False)


def test_the_student_comes_nearer_to_its_teacher(run):
    before, after = curve(run[1])
    assert (before["step"], after["step"]) == (0, STEPS)
    assert after["eval_kl"] < 0.95 * before["eval_kl"]


def test_what_was_trained_changed_and_nothing_else(run, inputs):
    trainable, output_dir = run
    before, after = weights(inputs / "checkpoint"), weights(output_dir / "model")
    assert after.keys() - before.keys() == {name for name in after if is_merger(name)}
    for name, tensor in before.items():
        is_trained = trainable == "full" and "semantic_encoder" not in name
        assert torch.equal(after[name], tensor) != is_trained, name
        assert after[name].dtype == tensor.dtype
    trainer = build_trainer(*options(inputs, output_dir))
    fresh = trainer.model.student.model.learned_merger.state_dict()
    assert all(not torch.equal(after[f"model.learned_merger.{name}"], tensor) for name, tensor in fresh.items())
    adapter = output_dir / "model" / "adapter" / "adapter_model.safetensors"
    assert adapter.exists() == (trainable == "lora")
    if trainable == "lora":
        assert all(tensor.any() for tensor in load_file(adapter).values())


def test_the_uncompressed_model_is_where_it_was(run, inputs):
    trainable, output_dir = run
    original, adapted = loaded(inputs / "checkpoint"), loaded(output_dir / "model")
    ids = random_ids(2, 80)
    for arguments in ({"compression": False}, {"compression": False, "logits_to_keep": 2}):
        before, after = (model(ids, **arguments).logits for model in (original, adapted))
        assert torch.equal(before, after) == (trainable != "full")
    assert has_adapter(adapted) == (trainable == "lora")
    compressed = [model(ids, logits_to_keep=2).logits for model in (original, adapted)]
    assert not torch.allclose(*compressed, atol=1e-3)


def test_the_folder_says_what_it_was_adapted_for(run):
    trainable, output_dir = run
    config = json.loads((output_dir / "model" / "config.json").read_text())
    assert config["merge_mode"] == "learned"
    assert config["merger_base"] == "mean"
    assert config["adapted_for"] == {
        "position_mode": "original",
        "segmentation_mode": "boundary",
        "trainable": trainable,
        "objective": "packed",
        "span_lengths": OPTIONS["span_lengths"],
        "steps": STEPS,
    }
    assert AutoTokenizer.from_pretrained(output_dir / "model")("the cat")["input_ids"]
    assert (output_dir / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert ("eval_uncompressed_drift" in curve(output_dir)[-1]) == (trainable == "full")
    assert not (output_dir / "model.tmp").exists()


def test_an_adapted_folder_with_an_adapter_is_not_adapted_again(run, inputs, tmp_path):
    trainable, output_dir = run
    again = options(inputs, tmp_path, {"checkpoint": str(output_dir / "model"), "trainable": trainable}, max_steps=1)
    if trainable == "lora":
        with pytest.raises(ValueError, match="carries an adapter already"):
            build_trainer(*again)
    else:  # it goes on from the merger that it finds
        merger = build_trainer(*again).model.student.model.learned_merger.state_dict()
        after = weights(output_dir / "model")
        assert all(torch.equal(after[f"model.learned_merger.{name}"], tensor) for name, tensor in merger.items())


def test_a_bfloat16_checkpoint_stays_one(tmp_path):
    inputs = make_inputs(tmp_path, dtype=torch.bfloat16)
    for model_dtype in ("float32", "bfloat16"):
        arguments = {"trainable": "lora", "model_dtype": model_dtype}
        folder = adapt(*options(inputs, tmp_path / model_dtype, arguments, max_steps=2, eval_strategy="no"))
        before, after = weights(inputs / "checkpoint"), weights(folder)
        assert all(after[name].dtype == t.dtype and torch.equal(after[name], t) for name, t in before.items())
        merger = [tensor for name, tensor in after.items() if is_merger(name)]
        assert {tensor.dtype for tensor in merger} == {torch.bfloat16}
        ids = random_ids(1, 80)
        original, adapted = loaded(inputs / "checkpoint"), loaded(folder)
        assert torch.equal(*(m(ids, compression=False).logits for m in (original, adapted)))


def test_the_merger_learns_alone_at_first(inputs, tmp_path):
    """Half of the steps; then the adapter follows the whole schedule in the other half."""
    arguments = {"trainable": "lora", "merger_only_share": 0.5}
    training = {"eval_strategy": "no", "save_steps": 1, "save_total_limit": None, "lr_scheduler_type": "linear"}
    adapt(*options(inputs, tmp_path, arguments, warmup_steps=2, learning_rate=1.0, **training))
    is_there, rates = [], []
    for step in range(1, 9):
        state = load_file(tmp_path / f"checkpoint-{step}" / "trained.safetensors")
        is_there.append(any(tensor.any() for name, tensor in state.items() if "lora_B" in name))
        state = torch.load(tmp_path / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)
        rates.append(state["param_groups"][1]["lr"])
    # The first step of a warm-up has a rate of zero.
    assert is_there == [False] * 5 + [True] * 3
    assert rates == pytest.approx([0, 0, 0, 0, 0.5, 1, 0.5, 0])


def test_position_mode_is_recorded(inputs, tmp_path):
    arguments = {"set_fields": ["position_mode=compact", "max_span_length=4", "merger_base=representative"]}
    folder = adapt(*options(inputs, tmp_path, arguments, max_steps=1, eval_strategy="no"))
    config = AutoModelForCausalLM.from_pretrained(folder).config
    assert config.position_mode == config.adapted_for["position_mode"] == "compact"
    assert (config.max_span_length, config.merger_base) == (4, "representative")
    assert not (tmp_path / "curve.csv").exists()


def history(output_dir):
    (state,) = output_dir.glob("checkpoint-*/trainer_state.json")
    return json.loads(state.read_text())["log_history"]


def test_accumulated_batches_are_one_big_batch(inputs, tmp_path):
    arguments = {"span_lengths": [3]}
    logs, merger = [], []
    for rows, accumulation in ((4, 1), (2, 2), (1, 4)):
        training = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
        folder = adapt(*options(inputs, tmp_path / str(rows), arguments, max_steps=1, warmup_steps=0, **training))
        logs.append(next(r for r in history(tmp_path / str(rows)) if "loss" in r))
        merger.append(weights(folder)["model.learned_merger.out_proj"])
    assert merger[0].any()
    for log, out_proj in zip(logs[1:], merger[1:], strict=True):
        assert log["loss"] == pytest.approx(logs[0]["loss"], rel=1e-3)
        assert log["kl"] == pytest.approx(logs[0]["kl"], rel=1e-3)
        assert log["grad_norm"] == pytest.approx(logs[0]["grad_norm"], rel=1e-3)
        torch.testing.assert_close(out_proj, merger[0], rtol=1e-2, atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_changes_nothing(inputs, tmp_path):
    states = []
    for on in (False, True):
        training = {"max_steps": 2, "eval_strategy": "no", "gradient_checkpointing": on}
        folder = adapt(*options(inputs, tmp_path / str(on), {"trainable": "lora"}, **training))
        states.append(weights(folder))
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-3, atol=1e-5)


def test_the_script_runs(inputs, tmp_path):
    fields = ("--set-fields", "position_mode=compact", "--ratios", "2", "4", "--weights", "novel.txt=1.5")
    lengths = ("--context-length", "64", "--target-length", "16", "--chunk-length", "32", "--span-lengths", "1", "4")
    sizes = ("--max-steps", "2", "--per-device-train-batch-size", "2", "--evaluation-windows", "1")
    paths = ("--checkpoint", inputs / "checkpoint", "--text", inputs / "text", "--output-dir", tmp_path / "run")
    rest = ("--held-out-share", "0.3", "--bf16", "False", "--trainable", "lora", "--use-cpu")
    printed = run_script("adapt.py", *paths, *fields, *lengths, *sizes, *rest).stdout
    assert printed.splitlines()[-1] == str(tmp_path / "run" / "model")
    config = loaded(tmp_path / "run" / "model").config
    assert (config.adapted_for["trainable"], config.position_mode) == ("lora", "compact")


def test_the_parts_of_a_run_make_its_checkpoint_again(run, inputs, tmp_path):
    trainable, output_dir = run
    adapted, parts, again = output_dir / "model", tmp_path / "parts", tmp_path / "again"
    if trainable == "full":
        with pytest.raises(ValueError, match="a merger or an adapter alone"):
            extract_parts(adapted, parts)
        return
    extract_parts(adapted, parts, dtype=torch.float32)
    apply_parts(inputs / "checkpoint", parts, again)
    assert loaded(again).config.adapted_for == loaded(adapted).config.adapted_for
    ids = random_ids(1, 64)
    ours, theirs = (loaded(folder)(ids, logits_to_keep=1) for folder in (again, adapted))
    assert ours.compressed_lengths < 64
    assert torch.equal(ours.logits, theirs.logits)
    with pytest.raises(FileNotFoundError, match=r"fields\.json"):
        apply_parts(inputs / "checkpoint", adapted, again)


@pytest.mark.parametrize("native", [torch.bfloat16, torch.float32], ids=str)
def test_mixed_precision_is_where_the_device_multiplies_it(monkeypatch, tmp_path, native):
    monkeypatch.setattr("semtoken_hf.training.adaptation_arguments.native_dtype", lambda device: native)
    assert AdaptationTrainingArguments(output_dir=str(tmp_path), use_cpu=True).bf16 is (native == torch.bfloat16)
    assert not AdaptationTrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=False).bf16
