"""Heads beside the language model: sequence classification reads slots, those that read every token are plain."""

import json

import pytest
import torch
import transformers
from torch.nn.functional import pad
from transformers import CONFIG_MAPPING, Trainer, TrainingArguments

from semtoken_hf import SemTokenLlamaForSequenceClassification
from tests.fixtures.children import run_clean
from tests.fixtures.logs import warnings_of
from tests.fixtures.tiny import FAMILIES, plain_config, random_ids, tiny_config, tiny_model, tiny_tokenizer

SEQUENCE = "AutoModelForSequenceClassification"
TOKENWISE = ("AutoModelForTokenClassification", "AutoModelForQuestionAnswering")


def head(auto_class, family="llama", **fields):
    """A random head and its plain twin, which do without dropout."""
    torch.manual_seed(0)
    auto = getattr(transformers, auto_class)
    model = auto.from_config(tiny_config(family, num_labels=3, **fields)).eval()
    attention = model.config._attn_implementation
    plain = auto.from_config(plain_config(model.config, num_labels=3, attn_implementation=attention)).eval()
    rest = {k: v for k, v in model.state_dict().items() if not k.startswith(f"{model.base_model_prefix}.")}
    plain.load_state_dict(rest, strict=False)
    base = {k: v for k, v in model.base_model.state_dict().items() if "semantic_encoder" not in k}
    plain.base_model.load_state_dict(base)
    return model, plain


def served(auto_class):
    mapping = getattr(transformers, auto_class)._model_mapping
    return [family for family in FAMILIES if CONFIG_MAPPING[family] in mapping]


@pytest.mark.parametrize("family", served(SEQUENCE))
def test_a_classifier_reads_the_last_slot(family):
    """Law 2, and law 1 where it is off or the text is short."""
    model, plain = head(SEQUENCE, family)
    ids = random_ids(2, 60)
    outputs = model(ids, labels=torch.tensor([0, 2]))
    slots = model.base_model(ids, read_mask=(torch.arange(60) == 59).expand(2, -1))
    assert torch.equal(outputs.logits, model.score(slots.last_hidden_state[:, -1]))
    assert torch.equal(outputs.loss, torch.nn.functional.cross_entropy(outputs.logits, torch.tensor([0, 2])))
    assert torch.equal(outputs.span_ids, slots.span_ids)
    assert outputs.compressed_lengths.tolist() == [25, 25]
    assert torch.equal(model(ids, compression=False).logits, plain(ids).logits)
    assert torch.equal(model(ids[:, :12]).logits, plain(ids[:, :12]).logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_padded_batch_are_classified_as_if_alone(side):
    model, _ = head(SEQUENCE)
    rows = [random_ids(1, length, length) for length in (64, 41, 30)]
    widths = [64 - row.shape[1] for row in rows]
    sides = [(width, 0) if side == "left" else (0, width) for width in widths]
    ids = torch.cat([pad(row, by) for row, by in zip(rows, sides, strict=True)])
    logits = model(ids, attention_mask=(ids != 0).long()).logits
    torch.testing.assert_close(logits, torch.cat([model(row).logits for row in rows]), atol=1e-5, rtol=1e-5)


def test_padding_that_the_configuration_does_not_name_is_plain(caplog):
    """Transformers would classify a token that the mask hides."""
    model, plain = head(SEQUENCE)
    ids = pad(random_ids(1, 60), (0, 4), value=7)
    mask = (torch.arange(64) < 60).long()[None]
    assert torch.equal(model(ids, attention_mask=mask).logits, plain(ids, attention_mask=mask).logits)
    assert "hides the classified token, the last other than `config.pad_token_id` (0)" in warnings_of(caplog)[0]


@pytest.mark.parametrize(("auto_class", "family"), [(a, f) for a in TOKENWISE for f in served(a)])
def test_heads_over_every_token_are_plain(auto_class, family, caplog):
    model, plain = head(auto_class, family)
    ids = random_ids(2, 60)
    expected = plain(ids).to_tuple()
    assert all(map(torch.equal, model(ids).to_tuple(), expected))
    assert warnings_of(caplog) == []
    assert all(map(torch.equal, model(ids, target_ratio=4.0).to_tuple(), expected))
    assert all(map(torch.equal, model(ids, compression=True).to_tuple(), expected))
    (warning,) = warnings_of(caplog)
    assert "its head reads every token" in warning


def test_trainer_trains_a_classifier(tmp_path):
    model, _ = head(SEQUENCE)
    before, seen = {name: value.clone() for name, value in model.state_dict().items()}, []
    model.register_forward_hook(lambda _, args, outputs: seen.append(outputs.compressed_lengths))
    data = [{"input_ids": row, "labels": i % 3} for i, row in enumerate(random_ids(4, 60))]
    arguments = TrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no"
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert seen[0].tolist() == [25] * 4
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == ("semantic_encoder" in name), name
    assert trainer.predict(data).predictions.shape == (4, 3)


CHILD = """
import json, sys, torch, transformers
folder, again = sys.argv[1:]
ids, facts = torch.arange(3, 63)[None], {}
for name in ("AutoModelForSequenceClassification", "AutoModelForTokenClassification", "AutoModelForQuestionAnswering"):
    auto = getattr(transformers, name)
    labels = {} if "Question" in name else {"num_labels": 3}
    model, info = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True, **labels)
    model.save_pretrained(f"{again}/{name}")
    loaded = auto.from_pretrained(f"{again}/{name}", trust_remote_code=True)
    same = all(map(torch.equal, model(ids).to_tuple()[:1], loaded(ids).to_tuple()[:1]))
    spans = getattr(model(ids), "compressed_lengths", None)
    facts[type(loaded).__name__] = [
        type(loaded).__module__.split(".")[0], sorted(info["missing_keys"]), same, spans and spans.tolist()
    ]
print("FACTS" + json.dumps(facts))
"""


def test_a_language_model_becomes_another_head_where_the_package_is_missing(tmp_path):
    """And is saved with the code of all."""
    tiny_model().save_pretrained(tmp_path / "lm")
    facts = run_clean(CHILD, tmp_path / "lm", tmp_path / "again", home=tmp_path / "home")
    remote = "transformers_modules"
    assert facts == {
        "SemTokenLlamaForSequenceClassification": [remote, ["score.weight"], True, [25]],
        "SemTokenLlamaForTokenClassification": [remote, ["score.bias", "score.weight"], True, None],
        "SemTokenLlamaForQuestionAnswering": [remote, ["qa_outputs.bias", "qa_outputs.weight"], True, None],
    }
    written = json.loads((tmp_path / "again" / SEQUENCE / "config.json").read_text())
    assert written["auto_map"] == {
        "AutoConfig": "configuration_semtoken_llama.SemTokenLlamaConfig",
        "AutoModel": "modeling_semtoken_llama.SemTokenLlamaModel",
        "AutoModelForCausalLM": "modeling_semtoken_llama.SemTokenLlamaForCausalLM",
        **{name: f"modeling_semtoken_llama.SemTokenLlama{name[9:]}" for name in (SEQUENCE, *TOKENWISE)},
    }


def test_a_reward_model_is_trained_by_trl(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    model = SemTokenLlamaForSequenceClassification(tiny_config(num_labels=1))
    seen = []
    model.register_forward_hook(lambda _, args, outputs: seen.append(outputs.compressed_lengths))
    text = "the cat sat on the mat and the dog ran to the man " * 6
    data = datasets.Dataset.from_dict({"chosen": [text + "the cat", text], "rejected": [text + "a dog", text + "on"]})
    arguments = trl.RewardConfig(
        tmp_path, max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no", bf16=False
    )
    trainer = trl.RewardTrainer(model=model, args=arguments, train_dataset=data, processing_class=tiny_tokenizer())
    before = model.score.weight.clone()
    trainer.train()
    assert seen[0] is not None
    assert not torch.equal(model.score.weight, before)
