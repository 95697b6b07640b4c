"""The recipes of docs/training_with_trl.md, where TRL is installed: they train and roll out on slots."""

from __future__ import annotations

import math

import pytest
import torch

from tests.docs.blocks import read_blocks
from tests.fixtures.children import ROOT

pytest.importorskip("trl", reason="TRL is not installed: run `bash scripts/trl_recipes.sh`")

CHAPTER = (ROOT / "scripts" / "quickstart_chapter.txt").read_text(encoding="utf-8")
SETUP, *RECIPES = [block.text for block in read_blocks("docs/training_with_trl.md") if block.language == "python"]
TRAINERS = ("sft", "dpo", "kto", "grpo")


@pytest.fixture
def recipe(tmp_path, monkeypatch, remote_modules):
    """A function of a trainer's name: the names of its recipe once that has run, and (tokens, slots) of every call."""
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    monkeypatch.chdir(tmp_path)

    def run(name):
        names, calls = {"long_prompt": CHAPTER}, []
        exec(SETUP, names)
        load = names["load"]

        def load_and_count():
            model = load()
            note = lambda _, args, kwargs: calls.append([kwargs["input_ids"].shape[1]])  # noqa: E731
            model.model.register_forward_pre_hook(note, with_kwargs=True)
            model.model.layers[0].register_forward_pre_hook(lambda _, args: calls[-1].append(args[0].shape[1]))
            return model

        names["load"] = load_and_count
        exec(RECIPES[TRAINERS.index(name)], names)
        return names, calls

    return run


@pytest.mark.parametrize("name", TRAINERS)
def test_a_recipe_trains_on_slots(name, recipe, caplog):
    names, calls = recipe(name)
    trainer = names[name]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.state.global_step == 2
    assert all(math.isfinite(loss) for loss in [*losses, trainer.state.log_history[-1]["train_loss"]])
    # With activation checkpointing, a layer runs again.
    long = [(tokens, slots) for tokens, *slots in calls if tokens > 1]
    assert len(long) >= 2
    assert all(slot < tokens / 1.5 for tokens, slots in long for slot in slots)
    assert "does not compress" not in caplog.text


def test_rollouts_and_training_agree(recipe):
    names, _ = recipe("grpo")
    trainer, tokenizer = names["grpo"], names["tokenizer"]
    model = trainer.model.eval()  # in training, checkpointed layers hold no cache
    texts = [names["prompts"][0], names["prompts"][1][:1400]]
    prompt = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    out = model.generate(
        **prompt, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True, eos_token_id=None
    )
    completion = out.sequences[:, prompt["input_ids"].shape[1] :]
    rolled = torch.stack(out.logits, 1).log_softmax(-1).gather(2, completion[..., None])[..., 0]
    kept = torch.arange(8) < torch.tensor([[8], [3]])
    mask = torch.cat([prompt["attention_mask"], kept.long()], 1)
    with torch.no_grad():
        trained, _, _ = trainer._get_per_token_logps_and_entropies(model.train(), out.sequences, mask, 8)
    assert (trained - rolled)[kept].abs().max() < 1e-4
