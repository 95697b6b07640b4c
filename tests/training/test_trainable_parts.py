"""What an adaptation trains, and at which rate."""

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from semtoken_hf.adapter_semtoken import has_adapter
from semtoken_hf.training.distillation import DistillationModel
from semtoken_hf.training.trainable_parts import choose_trainable, parameter_groups
from tests.fixtures.tiny import FAMILIES, random_ids, tiny_model


def chosen(trainable, dtype=torch.float32, **fields):
    model = tiny_model(dtype=dtype, merge_mode="learned", merger_rank=4, **fields)
    choose_trainable(model, trainable, lora_rank=3, lora_alpha=6)
    return model


def trained_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_merger():
    model = chosen("merger")
    merger = {f"model.learned_merger.{name}" for name, _ in model.model.learned_merger.named_parameters()}
    assert trained_names(model) == merger
    assert len(merger) > 1
    assert not has_adapter(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_of_every_family(family, tmp_path):
    """The adapter reaches every linear layer of the decoder, acts on merged slots alone, and comes back from disk."""
    fields = {"merge_mode": "learned", "merger_rank": 4, "family": family}
    model, ids = tiny_model(**fields), random_ids(1, 64)
    plain = model(ids).logits
    choose_trainable(model, "lora", lora_rank=3, lora_alpha=6)
    adapted = {name.split(".lora_")[0] for name in trained_names(model) if ".lora_" in name}
    name = "h" if family == "gpt2" else "layers"
    layers = dict(getattr(model.base_model, name).named_modules())
    # Matrices of any class: GPT-2's are `Conv1D`.
    wide = {n for n, m in layers.items() if getattr(getattr(m, "weight", None), "ndim", 0) == 2 and ".lora_" not in n}
    assert adapted == {f"{model.base_model_prefix}.{name}.{n.removesuffix('.base_layer')}" for n in wide}
    assert len(adapted) >= 8
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=0)
    merged = model(ids, logits_to_keep=2).logits
    assert not torch.allclose(merged, tiny_model(**fields)(ids, logits_to_keep=2).logits, atol=1e-2)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation=model.config._attn_implementation
    ).eval()
    torch.testing.assert_close(loaded(ids, logits_to_keep=2).logits, merged)
    torch.testing.assert_close(loaded(ids).logits, plain, rtol=0, atol=0)


def test_full():
    model = chosen("full")
    assert trained_names(model) == {n for n, _ in model.named_parameters() if "semantic_encoder" not in n}
    assert not has_adapter(model)


def test_what_is_trained_is_float32():
    model = chosen("lora", dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        expected = torch.float32 if parameter.requires_grad or "semantic_encoder" in name else torch.bfloat16
        assert parameter.dtype == expected, name
    outputs = model(random_ids(1, 64), logits_to_keep=2)
    outputs.logits.float().square().mean().backward()
    assert model.model.learned_merger.out_proj.grad.any()


def test_lora_asks_for_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="install `peft`"):
        chosen("lora")


@pytest.mark.parametrize(("trainable", "has_tasks"), [("merger", False), ("lora", True), ("full", False)])
def test_groups(trainable, has_tasks):
    module = DistillationModel(chosen(trainable), None, 0.0, has_tasks)
    fresh, *rest = parameter_groups(module, 0.01)
    assert fresh["lr"] == 0.01
    assert all("lr" not in group for group in rest)
    names = {p: n for n, p in module.named_parameters()}
    fresh_names = {names[p] for p in fresh["params"]}
    assert fresh_names == {
        n for n, p in module.named_parameters() if p.requires_grad and ("learned_merger" in n or n.startswith("head."))
    }
    assert any(n.startswith("head.") for n in fresh_names) == has_tasks
    assert len(rest) == (trainable != "merger")
    # Everything once, and nothing that is frozen.
    everything = [p for group in (fresh, *rest) for p in group["params"]]
    assert len(everything) == len(set(everything)) == sum(p.requires_grad for p in module.parameters())
