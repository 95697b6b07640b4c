from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from semtoken_hf import convert_checkpoint

from .checkpoints import edit_json

INDEX = "model.safetensors.index.json"


@pytest.fixture
def refused(encoder_folder, tmp_path):
    """A function that checks that a conversion raises, and that it leaves nothing behind."""

    def check(source, error: type[Exception], match: str, encoder="own", **options) -> None:
        encoder = encoder_folder if encoder == "own" else encoder
        with pytest.raises(error, match=match):
            convert_checkpoint(source, encoder, tmp_path / "out", progress=False, **options)
        assert not list(tmp_path.glob("out*"))

    return check


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"model_type": "opt"}, r"model_type 'opt'; only \['gemma2', .*'smollm3'\] can be converted. docs/compat"),
        ({"model_type": "semtoken_llama"}, "is a SemToken checkpoint already"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantised"),
        ({"num_hidden_layers": 3}, r"lacks tensors .*model\.layers\.2\.\S+, .* and 6 more"),
        ({"intermediate_size": 64}, r"other shapes .*model\.layers\.0\.mlp\.down_proj\.weight"),
    ],
)
def test_model_of_another_kind(make_llama, refused, fields, match):
    source = make_llama()
    edit_json(source / "config.json", **fields)
    refused(source, ValueError, match)


def test_untied_head_may_not_be_missing(make_llama, refused):
    source = make_llama(tie_word_embeddings=True)
    edit_json(source / "config.json", tie_word_embeddings=False)
    refused(source, ValueError, r"lacks tensors of a SemTokenLlamaForCausalLM: lm_head\.weight$")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_files(make_llama, refused, name):
    source = make_llama()
    (source / name).unlink()
    refused(source, FileNotFoundError, f"holds no {name}")


def test_truncated_weights(make_llama, refused):
    file = make_llama() / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    refused(file.parent, ValueError, r"model\.safetensors is damaged or incomplete")


def test_missing_shard(make_llama, refused):
    source = make_llama(max_shard_size="20KB")
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.unlink()
    refused(source, FileNotFoundError, f"lacks {shard.name}")


def test_no_such_model_or_encoder(make_llama, refused, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("not/a/hub/id", FileNotFoundError, "'not/a/hub/id' is neither a folder nor a Hub repository")
    refused("nobody/nothing", FileNotFoundError, "'nobody/nothing' is neither a folder nor a Hub repository")
    refused(make_llama(), FileNotFoundError, "'nobody/encoder' is neither", encoder="nobody/encoder")


def test_encoder_is_needed(make_llama, refused):
    refused(make_llama(), ValueError, "an `encoder` is needed", encoder=None)
    uniform = {"encoder": None, "segmentation_mode": "uniform", "encoder_layers": 1}
    refused(make_llama(), ValueError, "`encoder_layers` needs an `encoder`", **uniform)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda f: edit_json(f / "config.json", model_type="unheard_of"), ValueError, "'unheard_of', which Transf"),
        (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "has no safetensors"),
        (lambda f: edit_json(f / "config.json", num_hidden_layers=3), ValueError, r"lack encoder\.layer\.2\."),
    ],
)
def test_unusable_encoder(make_llama, refused, encoder_folder, change, error, match):
    change(encoder_folder)
    refused(make_llama(), error, match)


def test_encoder_without_a_pooler_gets_zeros(make_llama, encoder_folder, tmp_path):
    file = encoder_folder / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "pooler" not in n}, file, metadata={"format": "pt"})
    out: Path = convert_checkpoint(make_llama(), encoder_folder, tmp_path / "out", progress=False)
    tensors = load_file(sorted(out.glob("*.safetensors"))[-1])
    pooler = {name: t for name, t in tensors.items() if "pooler" in name}
    assert len(pooler) == 2
    assert not any(t.any() for t in pooler.values())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target_ration": 3}, r"unknown configuration fields \['target_ration'\]; known are .*'target_ratio'"),
        ({"target_ratio": 0.5}, "`target_ratio` must be"),
        (
            {"encoder_dtype": "float16"},
            r"`encoder_dtype` must be one of .*'auto', .*got 'float16'",
        ),
        ({"dtype": "float32"}, "`dtype` is for GGUF files and adapters; the weights of a plain checkpoint keep theirs"),
        ({"encoder_layers": 3}, "the encoder's layers, got 3"),
    ],
)
def test_options_that_make_no_sense(make_llama, refused, options, match):
    refused(make_llama(), ValueError, match, **options)


def test_a_field_out_of_range_is_refused_before_anything_is_read(refused, tmp_path):
    refused(tmp_path / "nowhere", ValueError, "`target_ratio` must be", encoder=tmp_path / "nowhere", target_ratio=0.5)
