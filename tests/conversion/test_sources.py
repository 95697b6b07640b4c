"""What becomes a plain checkpoint before it is converted: GGUF files and PEFT adapters."""

from __future__ import annotations

import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from semtoken_hf import SemTokenFastTokenizer, convert_checkpoint
from semtoken_hf.conversion import gguf, lora

from .checkpoints import VOCAB_SIZE, edit_json, word_tokenizer
from .gguf_files import write_gguf

# Rows of whole blocks of Q8_0.
SIZES = {"intermediate_size": 64, "tie_word_embeddings": True}
TEXT = " the cats walking, the cat" * 40


@pytest.fixture
def gguf_file(make_llama, tmp_path):
    """In a folder of its own."""
    # A row of the vocabulary for every token: the file says no other size.
    tokenizer = word_tokenizer([f"w{i}" for i in range(40)])
    source = make_llama(tokenizer, vocab_size=len(tokenizer), **SIZES)
    model = LlamaForCausalLM.from_pretrained(source)
    (tmp_path / "gguf").mkdir()
    write_gguf(tmp_path / "gguf" / "tiny.Q8_0.gguf", model, tokenizer)
    shutil.rmtree(source)
    return tmp_path / "gguf" / "tiny.Q8_0.gguf"


def convert(source, encoder_folder, tmp_path, **options):
    return convert_checkpoint(source, encoder_folder, tmp_path / "out", progress=False, **options)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_off_is_the_plain_model_of_the_same_file(gguf_file, encoder_folder, tmp_path, dtype):
    out = convert(gguf_file, encoder_folder, tmp_path, dtype=dtype)
    place, wanted = {"gguf_file": gguf_file.name}, torch.float32 if dtype is None else torch.bfloat16
    plain = AutoModelForCausalLM.from_pretrained(gguf_file.parent, **place, dtype=wanted).eval()
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not any(info.values())
    assert model.dtype == wanted
    assert getattr(model.config, "quantization_config", None) is None
    tokenizer, theirs = (
        SemTokenFastTokenizer.from_pretrained(out),
        AutoTokenizer.from_pretrained(gguf_file.parent, **place),
    )
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    assert ids.tolist() == [theirs(TEXT)["input_ids"]]
    assert tokenizer.chat_template == theirs.chat_template is not None
    with torch.no_grad():
        assert torch.equal(model(ids, compression=False).logits, plain(ids).logits)
        assert model(ids, logits_to_keep=1).compressed_lengths < ids.shape[1]
    assert model.generation_config.eos_token_id == plain.generation_config.eos_token_id
    # Nothing that was needed on the way is left.
    assert {path.name for path in tmp_path.iterdir()} == {"gguf", "encoder", "out"}


def test_a_folder_of_several_files_needs_a_name(gguf_file, encoder_folder, tmp_path):
    shutil.copy(gguf_file, gguf_file.with_name("tiny.Q4_0.gguf"))
    with pytest.raises(ValueError, match=r"several GGUF files.*--gguf-file.*: tiny.Q4_0.gguf, tiny.Q8_0.gguf"):
        convert(gguf_file.parent, encoder_folder, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no file 'tiny\.gguf'"):
        convert(gguf_file.parent, encoder_folder, tmp_path, gguf_file="tiny.gguf")
    assert convert(gguf_file.parent, encoder_folder, tmp_path, gguf_file=gguf_file.name).is_dir()


@pytest.mark.parametrize(
    ("damage", "error", "match"),
    [
        (lambda f, m: f.write_bytes(f.read_bytes()[:100]), ValueError, "damaged"),
        (lambda f, m: f.write_bytes(b"GGML" * 100), ValueError, "damaged or no GGUF file"),
        (lambda f, m: m.setattr(gguf, "is_gguf_available", lambda: False), ImportError, r"semtoken-hf\[gguf\]"),
    ],
)
def test_what_cannot_be_read_is_refused(gguf_file, encoder_folder, tmp_path, monkeypatch, damage, error, match):
    damage(gguf_file, monkeypatch)
    with pytest.raises(error, match=match):
        convert(gguf_file, encoder_folder, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"gguf", "encoder"}


@pytest.mark.parametrize(
    ("arch", "match"), [("stablelm", "model_type 'stablelm'; only"), ("rwkv6", "rwkv6.*cannot|cannot.*rwkv6")]
)
def test_other_architectures_are_refused_before_anything_is_dequantised(
    make_llama, encoder_folder, tmp_path, arch, match
):
    tokenizer = word_tokenizer(["w"])
    model = LlamaForCausalLM.from_pretrained(make_llama(tokenizer, vocab_size=len(tokenizer), **SIZES))
    write_gguf(tmp_path / "other.gguf", model, tokenizer, arch)
    with pytest.raises(ValueError, match=match):
        convert(tmp_path / "other.gguf", encoder_folder, tmp_path)


def test_a_file_of_another_kind_is_refused(encoder_folder, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"model.pt is no folder and no .gguf file"):
        convert(tmp_path / "model.pt", encoder_folder, tmp_path)


@pytest.fixture
def adapter(make_llama, tmp_path):
    """A LoRA of the plain Llama, in a folder of its own."""
    model = LlamaForCausalLM.from_pretrained(make_llama())
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_an_adapter_is_merged_into_its_base(adapter, encoder_folder, tmp_path, dtype):
    out = convert(adapter, encoder_folder, tmp_path, dtype=dtype)
    base = LlamaForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.bfloat16 if dtype else torch.float32)
    ids = torch.randint(3, VOCAB_SIZE, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = base(ids).logits
        plain = PeftModel.from_pretrained(base, adapter).merge_and_unload().eval()
        model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
        assert torch.equal(model(ids, compression=False).logits, plain(ids).logits)
        assert not torch.equal(before, plain(ids).logits)
        assert model(ids, logits_to_keep=1).compressed_lengths < 300
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "lora", "encoder", "out"}


@pytest.mark.parametrize(
    ("damage", "error", "match"),
    [
        (lambda f, m: edit_json(f / "adapter_config.json", base_model_name_or_path=None), ValueError, "names no"),
        (lambda f, m: (f / "adapter_model.safetensors").unlink(), FileNotFoundError, "save the adapter again"),
        (lambda f, m: m.setattr(lora, "is_peft_available", lambda: False), ImportError, r"semtoken-hf\[adapt\]"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused(
    adapter, encoder_folder, tmp_path, monkeypatch, damage, error, match
):
    damage(adapter, monkeypatch)
    with pytest.raises(error, match=match):
        convert(adapter, encoder_folder, tmp_path)
    assert not (tmp_path / "out").exists()
