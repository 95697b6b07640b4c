"""What users of Transformers do without thinking: cast, evaluate with a Trainer, pad on the wrong side, pin."""

import numpy as np
import pytest
import torch
from transformers import BertConfig, Trainer, TrainingArguments
from transformers.quantizers.quantizers_utils import should_convert_module

from semtoken_hf import SpanPlanner
from semtoken_hf.token_layout import TokenLayout
from tests.fixtures.layouts import trimmed_layout
from tests.fixtures.tiny import ragged_prompts, random_ids, tiny_model, tiny_tokenizer

BERT = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)


@pytest.mark.parametrize("encoder_config", [None, BERT], ids=["static", "transformer"])
@pytest.mark.parametrize("cast", ["half", "bfloat16", "to"])
def test_the_encoder_stays_float32_and_the_plan_the_same(encoder_config, cast):
    model, ids = tiny_model(encoder_config=encoder_config), random_ids(1, 200)
    plan = model.compress(ids).span_ids
    model = model.to(torch.float16) if cast == "to" else getattr(model, cast)()
    assert model.dtype != torch.float32
    assert {p.dtype for p in model.model.semantic_encoder.parameters()} == {torch.float32}
    assert torch.equal(model.compress(ids).span_ids, plan)


def test_trainer_evaluates_merged_and_whole_batches_alike(tmp_path):
    model = tiny_model()
    partly, wholly = random_ids(1, 64)[0], random_ids(1, 64, seed=1)[0]
    data = [
        {"input_ids": partly, "labels": partly.where(torch.arange(64) > 50, -100)},
        {"input_ids": wholly, "labels": wholly},
    ]
    seen = []
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), per_device_eval_batch_size=1, report_to=[], use_cpu=True),
        eval_dataset=data,
        compute_metrics=lambda p: seen.append(p.predictions) or {"shape": float(p.predictions.ndim)},
    )
    assert trainer.evaluate()["eval_shape"] == 3
    assert seen[0].shape == (2, 64, model.config.vocab_size)
    assert np.isnan(seen[0][0]).any()
    assert not np.isnan(seen[0][1]).any()


def test_the_planner_is_read_from_the_revision_of_the_tokenizer(tmp_path, monkeypatch):
    tiny_tokenizer().save_pretrained(tmp_path)
    tokenizer = type(tiny_tokenizer()).from_pretrained(tmp_path, revision="v1", local_files_only=True)
    asked = {}
    monkeypatch.setattr(SpanPlanner, "from_pretrained", lambda name, **hub: asked.update(name=name, **hub))
    _ = tokenizer.planner
    assert asked == {"name": str(tmp_path), "revision": "v1", "local_files_only": True}


def test_quantisers_leave_the_encoder_alone():
    model = tiny_model(encoder_config=BERT)
    left = [name for name, _ in model.named_modules() if not should_convert_module(name, model._keep_in_fp32_modules)]
    assert left == [name for name, _ in model.named_modules() if "semantic_encoder" in name]


def test_a_layout_moves_to_another_device():
    mask = ragged_prompts()[1]
    nothing = torch.zeros_like(mask, dtype=torch.bool)
    moved = trimmed_layout(mask.bool(), nothing, nothing, 2, 4, 16).to("meta")
    assert isinstance(moved, TokenLayout)
    assert {value.device.type for value in vars(moved).values()} == {"meta"}
