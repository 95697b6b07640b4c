from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoTokenizer, LlamaForCausalLM

from semtoken_hf import SemTokenFastTokenizer, SemTokenLlamaForCausalLM, convert_checkpoint
from semtoken_hf.conversion.vocabulary import digit_token_ids, rare_token_ids, transplant_embeddings
from semtoken_hf.tokenization_semtoken_fast import special_token_ids

from .checkpoints import TOKENIZERS, VOCAB_SIZE, edit_json

INDEX = "model.safetensors.index.json"
FURTHER = {f"AutoModelFor{kind}" for kind in ("QuestionAnswering", "SequenceClassification", "TokenClassification")}


def tensors_in(folder: Path) -> dict[str, tuple[str, torch.Tensor]]:
    """File name and value of every tensor in the safetensors of a folder."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            for name in handle.offset_keys():
                assert name not in found
                found[name] = file.name, handle.get_tensor(name)
    return found


def convert(source, encoder, tmp_path, **options) -> Path:
    return convert_checkpoint(source, encoder, tmp_path / "out", progress=False, **options)


@pytest.mark.parametrize(
    ("dtype", "tied", "source_shards", "output_shards"),
    [
        (torch.float32, True, "5GB", "5GB"),
        (torch.bfloat16, False, "20KB", "5GB"),
        (torch.bfloat16, True, "5GB", "20KB"),
    ],
)
def test_every_tensor_keeps_its_bits(make_llama, encoder_folder, tmp_path, dtype, tied, source_shards, output_shards):
    source = make_llama(dtype=dtype, max_shard_size=source_shards, tie_word_embeddings=tied)
    assert (source / INDEX).exists() == (source_shards != "5GB")
    before = tensors_in(source)
    out = convert(source, encoder_folder, tmp_path, max_shard_size=output_shards)
    after = tensors_in(out)

    for name, (_, tensor) in before.items():
        assert after[name][1].dtype == dtype
        assert torch.equal(after[name][1].view(torch.uint8), tensor.view(torch.uint8)), name
    added = after.keys() - before.keys()
    assert added
    assert all(name.startswith("model.semantic_encoder.encoder.") for name in added)
    assert all(after[name][1].dtype == torch.bfloat16 for name in added)
    assert ("lm_head.weight" in after) == (not tied)

    plain_files, encoder_files = {after[n][0] for n in before}, {after[n][0] for n in added}
    assert len(encoder_files) == 1
    assert not plain_files & encoder_files
    assert (len(plain_files) == 1) == (output_shards == "5GB")
    index = json.loads((out / INDEX).read_text())
    assert index["weight_map"] == {name: file for name, (file, _) in after.items()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for _, t in after.values())
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize("kind", ["transformer", "static"])
def test_the_folder_loads_and_is_the_source_when_off(make_llama, encoder_folder, tmp_path, kind):
    source = make_llama()
    out = convert(source, encoder_folder, tmp_path, encoder_kind=kind, static_dim=8)
    model, info = SemTokenLlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert model.config.architectures == ["SemTokenLlamaForCausalLM"]
    assert model.generation_config.temperature == 0.7
    ids = torch.randint(3, VOCAB_SIZE, (2, 40))
    plain = LlamaForCausalLM.from_pretrained(source)
    assert torch.equal(model(ids, compression=False).logits, plain(ids).logits)
    merged = model(torch.randint(3, VOCAB_SIZE, (1, 600)), logits_to_keep=1)
    assert merged.compressed_lengths is not None


def test_encoder_is_the_original_on_the_new_vocabulary(make_llama, encoder_folder, tmp_path):
    out = convert(make_llama(), encoder_folder, tmp_path, encoder_dtype="float32")
    encoder = SemTokenLlamaForCausalLM.from_pretrained(out).model.semantic_encoder.encoder
    original, own_tokenizer = AutoModel.from_pretrained(encoder_folder), AutoTokenizer.from_pretrained(encoder_folder)
    assert encoder.config.vocab_size == VOCAB_SIZE
    assert encoder.config.model_type == "bert"
    table = transplant_embeddings(
        AutoTokenizer.from_pretrained(out.parent / "llama"),
        own_tokenizer,
        original.get_input_embeddings().weight,
        VOCAB_SIZE,
    )
    assert torch.equal(encoder.get_input_embeddings().weight, table)
    ours, theirs = encoder.state_dict(), original.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {"embeddings.word_embeddings.weight"}:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize(
    ("kind", "claimed"), [("byte_level", "TokenizersBackend"), ("metaspace", "LlamaTokenizerFast")]
)
def test_tokenizer_is_the_source_s(make_llama, encoder_folder, tmp_path, kind, claimed):
    tokenizer = TOKENIZERS[kind]()
    source = make_llama(tokenizer)
    edit_json(source / "tokenizer_config.json", tokenizer_class=claimed, legacy=True, add_bos_token=True)
    out = convert(source, encoder_folder, tmp_path)
    ours = SemTokenFastTokenizer.from_pretrained(out)
    for text in ("the cats walking", " the\n 7, é 漢", "walk<|tool|> the</s>cats", "  Ing "):
        assert ours(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert ours.decode(ours(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<s>", "</s>", "<pad>")
    messages = [{"role": "user", "content": "the cat"}]
    assert ours.apply_chat_template(messages, tokenize=False) == "user: the cat\n"


def test_protected_ids(make_llama, encoder_folder, tmp_path, lm_tokenizer):
    source = make_llama(lm_tokenizer)

    def protected(**options) -> list[int]:
        out = convert(source, encoder_folder, tmp_path, overwrite=True, **options)
        return SemTokenLlamaForCausalLM.config_class.from_pretrained(out).protected_token_ids

    special = set(special_token_ids(lm_tokenizer))
    digits, rare = set(digit_token_ids(lm_tokenizer)), set(rare_token_ids(lm_tokenizer, 0.1))
    assert len(special) == 4
    assert protected() == sorted(special)
    assert protected(protect_digits=True) == sorted(special | digits)
    everything = protected(protect_digits=True, protect_rare=0.1, protected_token_ids=[50])
    assert everything == sorted(special | digits | rare | {50})


def test_overrides_reach_the_configuration(make_llama, encoder_folder, tmp_path):
    source = make_llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5}, num_key_value_heads=1)
    edit_json(source / "config.json", temperature=0.5, auto_map={"AutoModelForTokenClassification": "x.Y"})
    out = convert(source, encoder_folder, tmp_path, target_ratio=4, segmentation_mode="greedy")
    config = SemTokenLlamaForCausalLM.config_class.from_pretrained(out)
    assert (config.target_ratio, config.segmentation_mode) == (4, "greedy")
    assert (config.rope_parameters["rope_theta"], config.num_key_value_heads) == (5e5, 1)
    written = json.loads((out / "config.json").read_text())
    assert "temperature" not in written
    assert written["auto_map"].keys() == {"AutoConfig", "AutoModel", "AutoModelForCausalLM", *FURTHER}


def test_written_configuration(make_llama, encoder_folder, tmp_path):
    source = make_llama(dtype=torch.bfloat16)
    edit_json(source / "config.json", dtype=None)
    out = convert(source, encoder_folder, tmp_path)
    written = json.loads((out / "config.json").read_text())
    assert written["dtype"] == "bfloat16"
    assert (written["encoder_config"]["dtype"], written["encoder_config"]["vocab_size"]) == ("bfloat16", VOCAB_SIZE)
    assert written["encoder_dtype"] == "auto"
    for file in ("config.json", "tokenizer_config.json"):
        assert str(tmp_path) not in (out / file).read_text(), "a local path is no part of a checkpoint"


def test_uniform_spans_need_no_encoder(make_llama, tmp_path):
    out = convert(make_llama(), None, tmp_path, segmentation_mode="uniform")
    model = SemTokenLlamaForCausalLM.from_pretrained(out)
    assert not model.model.semantic_encoder.encoder.get_input_embeddings().weight.any()
    outputs = model(torch.randint(3, VOCAB_SIZE, (1, 600)), logits_to_keep=1)
    assert outputs.compressed_lengths.item() <= 252  # 600 / 2.4, the 69 protected ones included, + rounding


def test_minilm_as_encoder(make_llama, minilm, tmp_path):
    out = convert(make_llama(), minilm, tmp_path)
    model, info = SemTokenLlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert model.config.encoder_config.hidden_size == 384
    assert model.model.semantic_encoder.encoder.embeddings.word_embeddings.weight.shape == (VOCAB_SIZE, 384)
