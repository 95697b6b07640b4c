"""The plain checkpoint inside a SemToken one: what was converted comes out again."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from semtoken_hf import convert_checkpoint
from semtoken_hf.conversion.plain import export_plain
from tests.fixtures.adapted import adapted_model
from tests.fixtures.tiny import FAMILIES, random_ids, tiny_model, tiny_tokenizer

from .checkpoints import edit_json
from .test_families import plain_folder

TEXT = "the cat walks <|tool|> 7 cats"


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def json_of(file) -> dict:
    return {k: v for k, v in json.loads(file.read_text()).items() if k != "transformers_version"}


@pytest.mark.parametrize(("family", "size"), [("llama", "20KB"), *((family, "5GB") for family in FAMILIES)])
def test_what_was_converted_comes_out_again(tmp_path, encoder_folder, family, size):
    source = plain_folder(tmp_path, family)
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    converted = convert_checkpoint(source, encoder_folder, tmp_path / "converted", progress=False)
    out = export_plain(converted, tmp_path / "out", max_shard_size=size, progress=False)
    theirs, ours = tensors_of(source), tensors_of(out)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
        assert ours[name].dtype == tensor.dtype, name
    assert (len(list(out.glob("*.safetensors"))) > 1) == (size == "20KB")
    assert json_of(out / "config.json") == json_of(source / "config.json")
    assert json_of(out / "generation_config.json") == json_of(source / "generation_config.json")
    assert not list(out.glob("*.py"))
    assert type(AutoModelForCausalLM.from_pretrained(out)) is type(AutoModelForCausalLM.from_pretrained(source))


def test_the_tokenizer_is_a_plain_one(tmp_path, encoder_folder):
    source = plain_folder(tmp_path, "llama")
    converted = convert_checkpoint(source, encoder_folder, tmp_path / "converted", progress=False)
    out = export_plain(converted, tmp_path / "out", progress=False)
    tokenizer, expected = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(source)
    assert type(tokenizer) is PreTrainedTokenizerFast
    assert tokenizer(TEXT).input_ids == expected(TEXT).input_ids
    assert tokenizer.chat_template == expected.chat_template is not None
    content = json.loads((out / "tokenizer_config.json").read_text())
    assert (content["tokenizer_class"], "auto_map" in content) == ("PreTrainedTokenizerFast", False)


@pytest.mark.parametrize("make", [adapted_model, lambda: tiny_model(merge_mode="learned")], ids=["adapter", "merger"])
def test_nothing_of_ours_is_left(tmp_path, make):
    model = make()
    model.save_pretrained(tmp_path / "semtoken")
    tiny_tokenizer().save_pretrained(tmp_path / "semtoken")
    out = export_plain(tmp_path / "semtoken", tmp_path / "out", progress=False)
    plain, info = LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert not list(out.rglob("adapter*"))
    ids = random_ids(1, 60)
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, model(ids, compression=False).logits)


def test_mistakes(tmp_path):
    folder, out = tmp_path / "semtoken", tmp_path / "out"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with pytest.raises(ValueError, match="it is no SemToken checkpoint"):
        export_plain(plain_folder(tmp_path, "llama"), out, progress=False)
    with pytest.raises(FileNotFoundError, match="neither a folder nor a Hub repository"):
        export_plain(tmp_path / "nowhere", out, progress=False)
    with pytest.raises(ValueError, match="holds what the conversion reads"):
        export_plain(folder, folder, overwrite=True, progress=False)
    edit_json(folder / "config.json", quantization_config={"quant_method": "quanto"})
    with pytest.raises(ValueError, match="is quantised"):
        export_plain(folder, out, progress=False)
    edit_json(folder / "config.json", quantization_config=None, num_hidden_layers=3)
    with pytest.raises(ValueError, match="lacks tensors of a LlamaForCausalLM"):
        export_plain(folder, out, progress=False)
    assert not out.exists()
    edit_json(folder / "config.json", num_hidden_layers=2)
    export_plain(folder, out, progress=False)
    with pytest.raises(FileExistsError, match="choose another folder or pass overwrite=True"):
        export_plain(folder, out, progress=False)
    assert export_plain(folder, out, overwrite=True, progress=False) == out
