"""A PEFT adapter of the user's own: made, trained, saved, merged; the encoder stays out of it.

The adapter for compressed rows that adaptation trains: `test_adapter.py`, `test_adapter_checkpoint.py`.
"""

import copy
import re

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.utils import logging

from semtoken_hf import SemTokenLlamaForCausalLM
from tests.fixtures.adapted import adapted_model
from tests.fixtures.children import run_clean
from tests.fixtures.logs import warnings_of
from tests.fixtures.tiny import BERT, plain_twin, ragged_prompts, random_ids, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")
TRANSFORMER = {"encoder_config": dict(BERT), "encoder_window": 48}
LLAMA_ENCODER = {"encoder_config": {**BERT, "model_type": "llama", "num_key_value_heads": 2}, "encoder_window": 48}
TOKENS = 96
IDS, MASK = ragged_prompts((TOKENS, 70))
WAYS = {
    "compressed": {"logits_to_keep": 2},
    "ratio": {"logits_to_keep": 2, "target_ratio": 4.0},
    "all logits": {},
}


def lora(targets="all-linear", **fields):
    return LoraConfig(r=2, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **fields)


def trained(model, seed=1):
    """`model` with LoRA weights that change what is read."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B.default" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.eval()


@pytest.mark.parametrize("fields", [{}, LLAMA_ENCODER], ids=["static", "llama encoder"])
def test_all_linear_means_the_decoder(capsys, fields):
    model = get_peft_model(tiny_model(**fields), lora())
    adapted = {re.sub(r"\.lora_.*", "", n) for n, p in model.named_parameters() if p.requires_grad}
    parts = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    names = [f"self_attn.{part}" for part in parts[0]] + [f"mlp.{part}" for part in parts[1]]
    assert adapted == {f"base_model.model.model.layers.{i}.{name}" for i in range(2) for name in names}
    model.print_trainable_parameters()
    # Rank 2 of the in- and outputs: q, o 64 + 64, k, v 64 + 32, and the MLP's 64 + 96.
    count = 2 * 2 * (2 * 128 + 2 * 96 + 3 * 160)
    total = sum(p.numel() for p in model.parameters())
    assert f"trainable params: {count:,} || all params: {total:,}" in capsys.readouterr().out
    model.train()
    assert not any(module.training for module in model.base_model.model.model.semantic_encoder.modules())


def test_a_name_that_is_the_encoder_s_too_is_refused_with_a_way_out():
    """Half an adapter that never learns would be silent."""
    with pytest.raises(ValueError, match=r"exclude_modules=r'\.\*semantic_encoder\.\*'"):
        get_peft_model(tiny_model(**TRANSFORMER), lora(["q_proj", "dense", "query"]))
    model = get_peft_model(tiny_model(**LLAMA_ENCODER), lora(["q_proj"], exclude_modules=r".*semantic_encoder.*"))
    assert not any("lora" in n for n, _ in model.named_parameters() if "semantic_encoder" in n)


@pytest.mark.parametrize("way", WAYS)
def test_forward_takes_our_arguments(way):
    model = tiny_model(**TRANSFORMER)
    adapted = trained(get_peft_model(copy.deepcopy(model), lora()))
    merged = copy.deepcopy(adapted).merge_and_unload()
    assert type(merged) is SemTokenLlamaForCausalLM
    with torch.no_grad():
        ours, expected, base = (m(input_ids=IDS, attention_mask=MASK, **WAYS[way]) for m in (adapted, merged, model))
        torch.testing.assert_close(ours.logits, expected.logits, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(ours.logits, base.logits, atol=0.1)
        # The adapter has no say in the plan.
        plan = base.get("span_ids")
        assert (plan is None) == (way == "all logits")
        assert plan is None or torch.equal(ours.span_ids, plan)
        with adapted.disable_adapter():
            # The head's product may round otherwise, as it does for a plain Llama in PEFT's hands.
            disabled = adapted(input_ids=IDS, attention_mask=MASK, **WAYS[way])
            torch.testing.assert_close(disabled.logits, base.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arguments", [{"target_ratio": 4.0}, {"num_beams": 2}, {"compression": False}], ids=str)
def test_generate(arguments):
    adapted = trained(get_peft_model(tiny_model(**TRANSFORMER), lora()))
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, **arguments}
    ours = adapted.generate(input_ids=IDS, attention_mask=MASK, **options)
    theirs = copy.deepcopy(adapted).merge_and_unload().generate(input_ids=IDS, attention_mask=MASK, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    if arguments.get("compression") is not False:
        assert torch.equal(ours.past_key_values.slot_lengths, theirs.past_key_values.slot_lengths)
        lengths = MASK.sum(1).repeat_interleave(arguments.get("num_beams", 1))
        assert (ours.past_key_values.compressed_lengths < lengths).all()


def test_gradient_checkpointing():
    """Reentrant, the inputs of the layers must ask for gradients, though the embeddings are frozen."""
    model = trained(get_peft_model(tiny_model(**TRANSFORMER), lora())).train()
    labels = IDS.where(torch.arange(TOKENS) > 80, -100)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": True})
            model.enable_input_require_grads()
        outputs = model(input_ids=IDS, attention_mask=MASK, labels=labels)
        assert (outputs.compressed_lengths < MASK.sum(1)).all()
        outputs.loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert gradients[0].keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)


CHILD = """
import json, sys
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
base, adapter, ids = sys.argv[1:]
ids = torch.tensor(json.loads(ids))
remote = {"trust_remote_code": True}
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, **remote), adapter).eval()
auto = AutoPeftModelForCausalLM.from_pretrained(adapter, **remote).eval()
assert type(model.get_base_model()).__module__.startswith("transformers_modules.")
outputs = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
facts = {
    "tokens": outputs.sequences.tolist(),
    "auto": auto.generate(input_ids=ids, max_new_tokens=6, do_sample=False).tolist(),
    "slots": outputs.past_key_values.compressed_lengths.tolist(),
    "frozen": not any(p.requires_grad for n, p in auto.named_parameters() if "semantic_encoder" in n),
}
print("FACTS" + json.dumps(facts))
"""


def test_trained_saved_and_loaded_in_a_clean_process(tmp_path):
    """With `Trainer`, the context compressed; nothing but the adapter and what `modules_to_save` names changes."""
    base = tiny_model(**TRANSFORMER, merge_mode="learned", merger_rank=4)
    base.save_pretrained(tmp_path / "base")
    base = SemTokenLlamaForCausalLM.from_pretrained(tmp_path / "base")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_peft_model(base, lora(modules_to_save=["learned_merger"]))
    ids, kept = random_ids(4, TOKENS, seed=3), []
    data = [{"input_ids": row, "labels": row.where(torch.arange(TOKENS) > 80, -100)} for row in ids]
    model.register_forward_hook(lambda *call: kept.append(call[-1].compressed_lengths))
    options = {"max_steps": 15, "per_device_train_batch_size": 4, "learning_rate": 0.02, "logging_steps": 1}
    options |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    trainer = Trainer(model, TrainingArguments(str(tmp_path / "run"), **options), train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    assert all((lengths < 60).all() for lengths in kept)
    state = model.get_base_model().state_dict()
    for name, tensor in before.items():
        candidates = [name, re.sub(r"\.(\w+)$", r".base_layer.\1", name)]
        candidates.append(name.replace("learned_merger", "learned_merger.original_module"))
        assert torch.equal(state[next(n for n in candidates if n in state)], tensor), name
    assert state["model.learned_merger.modules_to_save.default.out_proj"].any()

    trainer.save_model(str(tmp_path / "adapter"))
    model.eval()
    prompt = random_ids(1, 150, seed=9)
    expected = model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    facts = run_clean(CHILD, tmp_path / "base", tmp_path / "adapter", prompt.tolist(), home=tmp_path / "home")
    assert facts["tokens"] == facts["auto"] == expected.sequences.tolist()
    assert facts["slots"] == expected.past_key_values.compressed_lengths.tolist()
    assert facts["slots"][0] < 100
    assert facts["frozen"]


def test_add_adapter(tmp_path):
    """Transformers' own way: the folder of the adapter loads by itself."""
    tiny_model(**TRANSFORMER).save_pretrained(tmp_path / "base")
    model = SemTokenLlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.add_adapter(lora())
    trained(model)
    assert not any("lora" in n or p.requires_grad for n, p in model.named_parameters() if "semantic_encoder" in n)
    model.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("model*.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    ours, theirs = (m(IDS, attention_mask=MASK, logits_to_keep=2) for m in (loaded, model))
    torch.testing.assert_close(ours.logits, theirs.logits)
    assert torch.equal(ours.span_ids, theirs.span_ids)


def test_learned_prompts_fall_back(caplog):
    """PEFT hands embeddings to the model: exactly Llama, with a warning."""
    model, config = tiny_model(), PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    logits = []
    for twin in (model, plain_twin(model)):
        torch.manual_seed(0)
        adapted = get_peft_model(twin, copy.deepcopy(config)).eval()
        with torch.no_grad():
            logits.append(adapted(input_ids=IDS[:1], logits_to_keep=1).logits)
    assert torch.equal(*logits)
    (message,) = warnings_of(caplog)
    assert "does not compress" in message


class TestBesideTheCheckpointsOwnAdapter:
    """An adapted checkpoint brings an adapter for compressed rows; PEFT activates the user's instead."""

    def logits(self, model, **arguments):
        with torch.no_grad():
            return model(input_ids=IDS, attention_mask=MASK, logits_to_keep=2, **arguments).logits

    def test_a_warning_names_the_way_to_have_both(self, caplog):
        model = adapted_model()
        expected, off = self.logits(model), self.logits(model, compression=False)
        peft_model = get_peft_model(model, lora(["q_proj"]))
        assert not warnings_of(caplog)
        # Off, it has nothing to say anyway.
        assert torch.equal(self.logits(peft_model, compression=False), off)
        assert not warnings_of(caplog)
        assert not torch.allclose(self.logits(peft_model), expected, atol=0.1)
        (message,) = warnings_of(caplog)
        assert "set_adapter(['semtoken', name])" in message
        peft_model.base_model.set_adapter(["semtoken", "default"])
        torch.testing.assert_close(self.logits(peft_model), expected)
        assert torch.equal(self.logits(peft_model, compression=False), off)

    def test_what_is_merged_is_saved_without_it(self, tmp_path, caplog):
        model = trained(get_peft_model(adapted_model(), lora()))
        model.base_model.set_adapter(["semtoken", "default"])
        # All rows are compressed: merged into the weights, both say the same.
        expected = self.logits(model)
        merged = model.merge_and_unload()
        torch.testing.assert_close(self.logits(merged), expected, atol=1e-4, rtol=1e-4)
        logging.get_logger("semtoken_hf").warning_once.cache_clear()
        caplog.clear()
        merged.save_pretrained(tmp_path)
        (message,) = warnings_of(caplog)
        assert "saved without it" in message
        loaded = SemTokenLlamaForCausalLM.from_pretrained(tmp_path).eval()
        assert loaded.config.adapter_subfolder is None
        assert torch.equal(self.logits(loaded), self.logits(merged))

    def test_the_active_adapter_is_the_one_that_is_saved(self, tmp_path):
        model = adapted_model()
        model.add_adapter(lora(), "mine")
        model.save_pretrained(tmp_path / "mine")
        assert (tmp_path / "mine" / "adapter_config.json").is_file()
        assert not list((tmp_path / "mine").glob("model*.safetensors"))
        model.set_adapter("semtoken")
        model.save_pretrained(tmp_path / "own")
        loaded = SemTokenLlamaForCausalLM.from_pretrained(tmp_path / "own").eval()
        torch.testing.assert_close(self.logits(loaded), self.logits(model))
        assert list(loaded.peft_config) == ["semtoken"]
