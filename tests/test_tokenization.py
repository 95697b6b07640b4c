"""SemTokenFastTokenizer: plain by default, and on request the plan that the model would make."""

from __future__ import annotations

import json
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from semtoken_hf import SemTokenFastTokenizer, SpanPlanner
from tests.fixtures.tiny import LLAMA, tiny_model, tiny_tokenizer

LONG = "the cat sat on the mat and the dog ran to the man, who saw 12 cats. " * 3
TEXTS = [LONG, "a man sat on a mat while the other man ran after his dog, twice", "the end"]
PROTECTED = tiny_tokenizer().convert_tokens_to_ids("Q")
ENCODERS = {
    "static": None,
    "bert": BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, initializer_range=0.3
    ),
}


@pytest.fixture(scope="module", params=list(ENCODERS))
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(encoder_config=ENCODERS[request.param], protected_token_ids=[PROTECTED]).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture
def model(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval()


def plain_twin(tokenizer: SemTokenFastTokenizer) -> PreTrainedTokenizerFast:
    special = {name: getattr(tokenizer, name) for name in ("pad_token", "bos_token", "eos_token", "padding_side")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **special)


CALLS: list[dict[str, Any]] = [
    {},
    {"padding": True},
    {"padding": True, "padding_side": "right", "return_tensors": "pt"},
    {"padding": "max_length", "max_length": 90, "truncation": True, "return_tensors": "np"},
    {"return_attention_mask": False, "add_special_tokens": False},
    {"max_length": 9, "truncation": True, "return_overflowing_tokens": True, "stride": 2},
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("text", [TEXTS, LONG])
def test_plain_by_default(tokenizer, call: dict[str, Any], text: Any) -> None:
    assert type(tokenizer) is SemTokenFastTokenizer
    ours, plain = tokenizer(text, **call), plain_twin(tokenizer)(text, **call)
    assert ours.keys() == plain.keys()
    for name in plain:
        assert type(ours[name]) is type(plain[name])
        assert np.array_equal(ours[name], plain[name]) if "return_tensors" in call else ours[name] == plain[name]
    assert tokenizer._planner is None


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("text", [TEXTS, LONG])
def test_the_other_outputs_stay_when_it_plans(tokenizer, call: dict[str, Any], text: Any) -> None:
    plain, ours = plain_twin(tokenizer)(text, **call), tokenizer(text, **call, return_span_ids=True)
    assert ours.keys() - plain.keys() == {"span_ids"}
    for name in plain:
        assert np.array_equal(ours[name], plain[name]) if "return_tensors" in call else ours[name] == plain[name]
    if "return_tensors" in call:
        assert type(ours["span_ids"]) is type(ours["input_ids"])
        assert ours["span_ids"].shape == ours["input_ids"].shape


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("ratio", [None, 1.0, 4.0])
def test_span_ids_are_those_of_the_model(tokenizer, model, side: str, ratio: float | None) -> None:
    encoding = tokenizer(
        TEXTS, padding=True, padding_side=side, return_tensors="pt", return_span_ids=True, target_ratio=ratio
    )
    span_ids = encoding.pop("span_ids")
    prompt = model.compress(**encoding, target_ratio=ratio)
    assert torch.equal(span_ids, prompt.span_ids)
    assert prompt.is_merged is (ratio != 1.0)
    # Without padding and tensors, row by row and all at once: the same slots.
    ragged = tokenizer(TEXTS, return_span_ids=True, target_ratio=ratio)["span_ids"]
    for row, text in enumerate(TEXTS):
        assert span_ids[row][span_ids[row] >= 0].tolist() == ragged[row]
        assert tokenizer(text, return_span_ids=True, target_ratio=ratio)["span_ids"] == ragged[row]
        tensor = tokenizer(text, return_span_ids=True, target_ratio=ratio, return_tensors="pt")["span_ids"]
        assert tensor.tolist() == [ragged[row]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("extra", [{}, {"return_tensors": "pt"}, {"pad_to_multiple_of": 16}])
def test_padding_later_is_padding_at_once(tokenizer, side: str, extra: dict[str, Any]) -> None:
    tokenizer.padding_side = side
    asked = {"return_span_ids": True, "return_protected_mask": True}
    examples = [tokenizer(text, **asked) for text in TEXTS]
    at_once = tokenizer(TEXTS, padding=True, **asked, **extra)
    for features in (examples, tokenizer(TEXTS, **asked)):
        later = tokenizer.pad(features, **extra)
        assert later.keys() == at_once.keys()
        for name, values in at_once.items():
            assert np.array_equal(np.array(later[name]), np.array(values)), name
    short = np.array(at_once["span_ids"])[2]
    is_padding = np.array(at_once["attention_mask"])[2] == 0
    assert is_padding.any()
    assert (short[is_padding] == -1).all()
    assert (np.array(at_once["protected_mask"])[2][is_padding] == 0).all()


def test_protected_mask(tokenizer) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tokenizer.add_tokens(["wombat"])
    text = "<|user|> the wombat sat Q on the mat</s>"
    encoding = tokenizer([text, "the"], padding=True, return_protected_mask=True, return_tensors="pt")
    assert "span_ids" not in encoding
    ids, protected = encoding["input_ids"][0].tolist(), encoding["protected_mask"].bool()
    always = {0, 1, 2, PROTECTED, *tokenizer.convert_tokens_to_ids(["<|user|>", "wombat"])}
    assert protected[0].tolist() == [i in always for i in ids]
    # BOS, user, wombat, EOS, and Q, which the configuration protects.
    assert protected[0].sum() == 5
    assert protected[1].tolist() == [False] * (len(ids) - 2) + [True, False]


def test_a_plan_beside_a_protected_mask_knows_the_mask(tokenizer, model) -> None:
    """Planned without it, the protected tokens would come on top of the budget."""
    tokenizer.add_tokens(["wombat"])
    text = "the wombat sat on the mat and the dog ran to the man. " * 4
    encoding = tokenizer(text, return_span_ids=True, return_protected_mask=True, return_tensors="pt")
    prompt = model.compress(**encoding)
    assert torch.equal(prompt.span_ids, encoding.pop("span_ids"))
    assert torch.equal(prompt.span_ids, model.compress(**encoding).span_ids)
    assert prompt.budget_met.all()


def test_without_a_checkpoint_the_planner_is_missing() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match=r"SpanPlanner\.from_model\(model\)"):
        tokenizer(LONG, return_span_ids=True)
    model = tiny_model()
    tokenizer.planner = SpanPlanner.from_model(model)
    encoding = tokenizer(LONG, return_span_ids=True, return_tensors="pt")
    assert torch.equal(encoding["span_ids"], model.compress(encoding["input_ids"]).span_ids)


def test_a_plain_checkpoint_has_no_encoder_to_plan_with(tmp_path) -> None:
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no semantic encoder: convert it"):
        SpanPlanner.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="no_such_folder"):
        SpanPlanner.from_pretrained(tmp_path / "no_such_folder", local_files_only=True)


def test_a_wrong_ratio_is_refused(tokenizer) -> None:
    with pytest.raises(ValueError, match="`target_ratio` must be a finite number >= 1"):
        tokenizer(LONG, return_span_ids=True, target_ratio=0.5)


def test_the_planner_of_a_sharded_checkpoint(checkpoint, model, tokenizer, tmp_path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    files = set(json.loads((tmp_path / SAFE_WEIGHTS_INDEX_NAME).read_text())["weight_map"].values())
    assert len(files) > 2
    planner = SpanPlanner.from_pretrained(tmp_path)
    expected = model.model.semantic_encoder.state_dict()
    assert planner.encoder.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in planner.encoder.state_dict().items())
    assert planner.protected_token_ids == [0, 1, 2, PROTECTED]
    ids = tokenizer(LONG, return_tensors="pt")["input_ids"]
    assert torch.equal(planner.plan(ids).span_ids, model.compress(ids).span_ids)


def test_a_tokenizer_of_another_model(checkpoint, tmp_path) -> None:
    """Its ids are not the encoder's."""
    tiny_model(vocab_size=280).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.name_or_path = str(tmp_path)
    with pytest.raises(ValueError, match=r"`input_ids` must be in .*tokenizer may belong to another model"):
        tokenizer(LONG, return_span_ids=True)
    assert "span_ids" in tokenizer("a", return_span_ids=True)


def test_the_planner_follows_added_tokens(tokenizer, model) -> None:
    """The tokenizer's own as the model; one of the model needs the model to be resized."""
    tokenizer.add_tokens([*(f"<{i}>" for i in range(LLAMA["vocab_size"] - len(tokenizer))), "<doc>"])
    tokenizer.planner = SpanPlanner.from_model(model)
    with pytest.raises(ValueError, match=r"call `model.resize_token_embeddings\(len\(tokenizer\)\)`"):
        tokenizer("<doc>" + LONG, return_span_ids=True)
    model.resize_token_embeddings(len(tokenizer))
    encoding = tokenizer("<doc>" + LONG, return_span_ids=True, return_tensors="pt")
    assert encoding["input_ids"].max() == LLAMA["vocab_size"]
    expected = model.compress(encoding["input_ids"]).span_ids
    assert torch.equal(encoding["span_ids"], expected)
    tokenizer.planner = None
    assert torch.equal(tokenizer("<doc>" + LONG, return_span_ids=True, return_tensors="pt")["span_ids"], expected)


def test_a_chat_that_is_no_list(tokenizer) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}!"
    with pytest.raises(ValueError, match="empty conversation"):
        tokenizer.apply_chat_template({}, protect_template=True)


class Collator:
    """Tokenises in the worker."""

    def __init__(self, tokenizer: SemTokenFastTokenizer):
        self.tokenizer = tokenizer

    def __call__(self, texts: list[str]) -> dict[str, Any]:
        return dict(self.tokenizer(texts, padding=True, return_tensors="pt", return_span_ids=True))


def test_in_a_data_loader_worker(tokenizer, model) -> None:
    loader = DataLoader(TEXTS * 2, batch_size=3, num_workers=1, collate_fn=Collator(tokenizer), timeout=60)
    batches = list(loader)
    assert len(batches) == 2
    for batch in batches:
        assert torch.equal(batch.pop("span_ids"), model.compress(**batch).span_ids)


def test_pickling_keeps_the_planner(tokenizer) -> None:
    expected = tokenizer(TEXTS, return_span_ids=True)["span_ids"]
    assert pickle.loads(pickle.dumps(tokenizer))(TEXTS, return_span_ids=True)["span_ids"] == expected


@pytest.mark.parametrize("merge_mode", ["mean", "representative"])
@pytest.mark.parametrize("masked", [False, True])
def test_generate_takes_the_outputs_and_says_the_same(tokenizer, model, merge_mode: str, masked: bool) -> None:
    model.config.merge_mode = merge_mode
    asked = {"return_span_ids": True, "return_protected_mask": masked}
    encoding = tokenizer(TEXTS, padding=True, return_tensors="pt", **asked)
    ready = {name: encoding[name] for name in ("span_ids", "protected_mask") if name in encoding}
    plain = {name: encoding[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        mine, theirs = model.compress(**plain), model.compress(**plain, **ready)
    assert mine.is_merged
    assert torch.equal(mine.inputs_embeds, theirs.inputs_embeds)
    assert torch.equal(mine.position_ids, theirs.position_ids)
    generated = model.generate(**encoding, max_new_tokens=6, do_sample=False)
    assert torch.equal(generated, model.generate(**plain, max_new_tokens=6, do_sample=False))
