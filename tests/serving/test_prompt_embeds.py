"""Prompt embeddings for vLLM: what the plain model generates from them is what `generate` says in compact positions."""

from __future__ import annotations

import base64
import io
import json
import os

import pytest
import torch
from transformers import AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from semtoken_hf.serving.prompt_embeds import (
    decode_prompt_embeds,
    encode_prompt_embeds,
    export_prompt,
    prompt_embeds_of,
)
from tests.fixtures.adapted import adapted_model
from tests.fixtures.tiny import FEW, LLAMA, plain_twin, ragged_prompts, random_ids, tiny_model, tiny_tokenizer

HIDDEN = LLAMA["hidden_size"]
TEXT = "the cat sat on the mat and the dog ran to the man " * 6
CHAT = [{"role": "system", "content": TEXT}, {"role": "user", "content": "and the dog ran to the cat ?"}]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
NEW = 12


def generated(model, **inputs):
    return model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0, -NEW:]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize(
    ("family", "merge_mode"),
    [("llama", "representative"), ("llama", "learned"), *((family, "mean") for family in FEW)],
)
def test_the_plain_model_generates_the_same(tokenizer, family, merge_mode):
    model = tiny_model(family=family, merge_mode=merge_mode, merger_rank=4, position_mode="compact")
    if merge_mode == "learned":
        torch.nn.init.normal_(model.base_model.learned_merger.out_proj, std=0.3)
    plain = plain_twin(model)
    # So that no row ends early, and as many tokens are compared as were asked for.
    plain.generation_config.eos_token_id = None
    exported = export_prompt(model, tokenizer, TEXT, target_ratio=3.0)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    expected = generated(model, input_ids=ids, target_ratio=3.0)
    read = decode_prompt_embeds(exported.to_base64())[None]
    assert torch.equal(generated(plain, inputs_embeds=read), expected)
    assert not torch.equal(generated(plain, input_ids=ids), expected)
    assert (exported.original_length, len(exported.prompt_embeds)) == (ids.shape[1], -(-ids.shape[1] // 3))
    assert exported.budget_met


@pytest.mark.parametrize("form", ["chat", "encoding"])
def test_chats_and_encodings(tokenizer, form):
    model = tiny_model(position_mode="compact")
    encoding = tokenizer.apply_chat_template(
        CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True, return_query_mask=form == "encoding"
    )
    exported = export_prompt(model, tokenizer, CHAT if form == "chat" else encoding)
    expected = model.compress(**encoding)
    assert torch.equal(exported.prompt_embeds, expected.inputs_embeds[0])
    assert exported.original_length == encoding["input_ids"].shape[1]


def test_a_plan_made_beforehand(tokenizer):
    model = tiny_model(position_mode="compact")
    encoding = tokenizer(TEXT, return_tensors="pt")
    encoding["span_ids"] = torch.arange(encoding["input_ids"].shape[1])[None] // 2
    assert torch.equal(
        export_prompt(model, tokenizer, encoding).prompt_embeds, model.compress(**encoding).inputs_embeds[0]
    )


def test_a_budget_that_cannot_be_met_is_told(tokenizer):
    assert not export_prompt(tiny_model(max_span_length=2), tokenizer, TEXT, target_ratio=8.0).budget_met


def test_only_the_embeddings_of_a_checkpoint_are_needed(tokenizer, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    light = AutoModel.from_pretrained(tmp_path, num_hidden_layers=0)
    expected = export_prompt(model, tokenizer, TEXT).prompt_embeds
    assert torch.equal(export_prompt(light, tokenizer, TEXT).prompt_embeds, expected)


def test_the_dtype_is_the_models_or_the_one_asked_for(tokenizer):
    half = tiny_model(dtype=torch.bfloat16)
    assert export_prompt(half, tokenizer, TEXT).prompt_embeds.dtype == torch.bfloat16
    exported = export_prompt(half, tokenizer, TEXT, dtype=torch.float16)
    assert exported.prompt_embeds.dtype == torch.float16
    assert torch.equal(exported.prompt_embeds.bfloat16(), export_prompt(half, tokenizer, TEXT).prompt_embeds)
    assert not exported.prompt_embeds.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_round_trip_keeps_every_bit(dtype):
    tensor = torch.randn(5, HIDDEN).to(dtype).requires_grad_()
    text = encode_prompt_embeds(tensor)
    read = decode_prompt_embeds(text)
    assert read.dtype == dtype
    assert torch.equal(read, tensor)
    # As vLLM reads it.
    content = io.BytesIO(base64.b64decode(text, validate=True))
    assert torch.equal(torch.load(content, weights_only=True, map_location="cpu"), tensor)


def test_a_request_is_json_without_a_prompt_beside_it(tokenizer):
    exported = export_prompt(tiny_model(), tokenizer, TEXT)
    request = json.loads(json.dumps(exported.to_request("plain", max_tokens=7, temperature=0)))
    assert torch.equal(decode_prompt_embeds(request.pop("prompt_embeds")), exported.prompt_embeds)
    assert request == {"model": "plain", "max_tokens": 7, "temperature": 0}


def test_what_cannot_be_exported(tokenizer):
    model = tiny_model()
    with pytest.raises(ValueError, match="one by one, got 4 rows"):
        export_prompt(model, tokenizer, dict(zip(("input_ids", "attention_mask"), ragged_prompts(), strict=True)))
    with pytest.raises(ValueError, match="one by one, got 2 rows"):
        prompt_embeds_of(model.compress(random_ids(2, 96), position_mode="compact"))
    with pytest.raises(ValueError, match="compress with `position_mode='compact'`"):
        prompt_embeds_of(model.compress(random_ids(1, 96), position_mode="original"))
    with pytest.raises(ValueError, match="the prompt is empty"):
        export_prompt(model, tokenizer, {"input_ids": torch.zeros(1, 0, dtype=torch.long)})
    with pytest.raises(ValueError, match="`target_ratio` must be a finite number >= 1"):
        export_prompt(model, tokenizer, TEXT, target_ratio=0.5)
    with pytest.raises(ValueError, match=r"must be one of .*float64"):
        encode_prompt_embeds(torch.zeros(2, HIDDEN, dtype=torch.float64))
    for shape in [(1, 2, HIDDEN), (HIDDEN,), (0, HIDDEN)]:
        with pytest.raises(ValueError, match=r"must have the shape \[slots, hidden\]"):
            encode_prompt_embeds(torch.zeros(shape))


def test_an_adapter_is_refused(tokenizer):
    model = adapted_model()
    with pytest.raises(ValueError, match=r"reads merged slots through an adapter.*`adapter_subfolder=None`"):
        export_prompt(model, tokenizer, TEXT)
    with pytest.raises(ValueError, match="reads merged slots through an adapter"):
        export_prompt(model.base_model, tokenizer, TEXT)


@pytest.mark.parametrize("mode", ["original", "compact"])
def test_another_position_mode_than_adapted_for_is_warned_of(tokenizer, caplog, mode):
    export_prompt(tiny_model(adapted_for={"position_mode": mode}), tokenizer, TEXT)
    warnings = [r.message for r in caplog.records if "adapted for position_mode='original'" in r.message]
    assert len(warnings) == (mode == "original")


@pytest.mark.parametrize("content", [{"a": 1}, torch.zeros(3)], ids=["dict", "1d"])
def test_bytes_that_hold_no_embeddings(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with pytest.raises(ValueError, match="these bytes hold no tensor"):
        decode_prompt_embeds(base64.b64encode(buffer.getvalue()))
    with pytest.raises(ValueError, match=r"base64|padding|ASCII"):
        decode_prompt_embeds("not base64!")


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: str):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_decoding_runs_no_code(tmp_path):
    buffer = io.BytesIO()
    torch.save(Malicious(str(tmp_path / "made")), buffer)
    with pytest.raises(ValueError, match="these bytes hold no tensor"):
        decode_prompt_embeds(base64.b64encode(buffer.getvalue()))
    assert not (tmp_path / "made").exists()


def test_vllm_on_the_folder_itself_says_that_it_is_plain(caplog, monkeypatch):
    """Its backend for remote code gives the model an attention of its own, `vllm`."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "vllm", ALL_ATTENTION_FUNCTIONS["sdpa"])
    model, ids = tiny_model().base_model, random_ids(1, 96)
    with torch.no_grad():
        expected = model(ids, compression=False).last_hidden_state
        model.config._attn_implementation = "vllm"
        assert torch.equal(model(ids, use_cache=False).last_hidden_state, expected)
    (warning,) = [r.message for r in caplog.records if "vLLM keeps its own cache" in r.message]
    assert "runs the plain model exactly" in warning
