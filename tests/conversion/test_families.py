"""Every family converts, loads with its own code, and is its source when compression is off."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
)

from semtoken_hf import SpanPlanner, convert_checkpoint
from semtoken_hf.conversion import weights
from tests.fixtures.tiny import FAMILIES

from .checkpoints import VOCAB_SIZE, byte_level_tokenizer

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def plain_folder(tmp_path, family, **fields):
    torch.manual_seed(2)
    config = CONFIG_MAPPING[family](**{**SIZES, **FAMILIES[family], **fields})
    folder = tmp_path / family
    MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("family", "tied"), [("llama", True), *((family, False) for family in FAMILIES)])
def test_converted_is_its_source_when_off(encoder_folder, tmp_path, family, tied):
    source = plain_folder(tmp_path, family, tie_word_embeddings=tied)
    out = convert_checkpoint(source, encoder_folder, tmp_path / "out", progress=False)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    plain = AutoModelForCausalLM.from_pretrained(source)
    assert isinstance(model, type(plain))
    ids = torch.randint(3, VOCAB_SIZE, (2, 600))
    assert torch.equal(model(ids, compression=False).logits, plain(ids).logits)
    assert model(ids, logits_to_keep=1).compressed_lengths.tolist() == [250, 250]
    assert SpanPlanner.from_pretrained(out).plan(ids).kept_lengths.tolist() == [250, 250]
    modules = {file.name for file in out.glob("*_semtoken_*.py")}
    assert {f"modeling_semtoken_{family}.py", f"configuration_semtoken_{family}.py"} <= modules
    others = FAMILIES.keys() - {family}
    assert not modules & {f"{kind}_semtoken_{other}.py" for other in others for kind in ("modeling", "configuration")}


@pytest.mark.parametrize("family", FAMILIES)
def test_remote_code_of_a_family(encoder_folder, tmp_path, remote_modules, family):
    """Loaded with the folder's own code, re-saved, and loaded again."""
    out = convert_checkpoint(plain_folder(tmp_path, family), encoder_folder, tmp_path / "out", progress=False)
    ids = torch.randint(3, VOCAB_SIZE, (1, 600))
    expected = AutoModelForCausalLM.from_pretrained(out).generate(ids, max_new_tokens=4, do_sample=False)
    for folder, again in ((out, tmp_path / "again"), (tmp_path / "again", tmp_path / "third")):
        code = {"trust_remote_code": True}
        # As if the package had not registered the classes.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AutoModelForCausalLM._model_mapping, "_extra_content", {})
            model = AutoModelForCausalLM.from_pretrained(folder, **code)
        assert type(model).__module__.startswith("transformers_modules.")
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)
        model.save_pretrained(again)
        AutoTokenizer.from_pretrained(folder, **code).save_pretrained(again)
        assert {f.name for f in again.glob("*.py")} == {f.name for f in out.glob("*.py")}


def test_names_of_the_file_are_those_of_the_loaded_model(tmp_path):
    """GPT-NeoX files call the head `embed_out`."""
    source = plain_folder(tmp_path, "gpt_neox")
    assert "embed_out.weight" in load_file(source / "model.safetensors")
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING["gpt_neox"]]
    renamed = weights.rename_as_loaded(weights.find_tensors(source), model_class)
    assert renamed.keys() == model_class.from_pretrained(source).state_dict().keys()
