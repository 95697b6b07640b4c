"""A checkpoint with an adapter: plain base weights, the adapter in a folder beside them, and what is missing named."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_imports

from semtoken_hf import SemTokenLlamaForCausalLM, adapter_semtoken
from semtoken_hf.adapter_semtoken import has_adapter
from tests.fixtures.adapted import adapted_model
from tests.fixtures.children import run_clean
from tests.fixtures.tiny import plain_twin, ragged_prompts, tiny_model, tiny_tokenizer

TEXT = "the cat sat on the mat and the dog ran to the man " * 6
WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An adapted model and its folder."""
    folder = tmp_path_factory.mktemp("adapted") / "model"
    model = adapted_model()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model, folder


def logits(model, **arguments):
    ids, mask = ragged_prompts((80, 60, 12))
    with torch.no_grad():
        return model(ids, attention_mask=mask, **{"logits_to_keep": 2, **arguments}).logits


def contents(folder):
    """Every weight in a folder, by file; the adapter's as float32."""
    files = {str(p.relative_to(folder)): load_file(p) for p in sorted(folder.rglob("*.safetensors"))}
    if WEIGHTS in files:
        files[WEIGHTS] = {name: tensor.float() for name, tensor in files[WEIGHTS].items()}
    return files


def assert_same_contents(ours, theirs):
    assert ours.keys() == theirs.keys()
    for file in ours:
        assert ours[file].keys() == theirs[file].keys()
        for name, tensor in ours[file].items():
            assert tensor.dtype == theirs[file][name].dtype
            assert torch.equal(tensor, theirs[file][name]), name


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_again_and_again(tmp_path, fields, dtype):
    model = adapted_model(dtype=dtype, **fields).to(dtype)
    folders = [tmp_path / name for name in ("first", "second", "third")]
    expected, loaded = logits(model), model
    for folder in folders:
        loaded.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert type(loaded) is SemTokenLlamaForCausalLM
        assert has_adapter(loaded)
        assert loaded.dtype == dtype
        # PEFT computes loaded adapters in float32.
        tolerance = {"rtol": 0, "atol": 0.3} if dtype == torch.bfloat16 and folder is folders[0] else {}
        torch.testing.assert_close(logits(loaded), expected, **tolerance)
        expected = logits(loaded)
    assert not torch.allclose(logits(loaded, compression=False), logits(loaded), atol=0.5)
    for folder in folders[1:]:
        assert_same_contents(contents(folder), contents(folders[0]))


def test_the_saved_base_is_the_plain_checkpoint(tmp_path, saved):
    """The same names and bits as the model had before it got its adapter."""
    model, folder = saved
    before = tiny_model(merge_mode="learned", merger_rank=4)
    before.model.learned_merger.load_state_dict(model.model.learned_merger.state_dict())
    before.save_pretrained(tmp_path)
    assert_same_contents({"model.safetensors": contents(folder)["model.safetensors"]}, contents(tmp_path))
    with safe_open(folder / WEIGHTS, "pt") as file:
        names = set(file.keys())
    assert len(names) == 2 * 2 * 7
    assert all(name.startswith("base_model.model.model.layers.") and ".lora_" in name for name in names)
    assert not list(folder.glob("adapter_*.safetensors"))


def test_shards(tmp_path, saved):
    model, _ = saved
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_loading_leaves_the_base_as_trainable_and_exact_as_it_was(saved):
    """As without the adapter: nothing but the encoder is frozen, and the uncompressed model is Llama's, bit for bit."""
    _, folder = saved
    loaded, base = (AutoModelForCausalLM.from_pretrained(folder, **a) for a in ({}, {"adapter_subfolder": None}))
    flags = {n.replace(".base_layer", ""): p.requires_grad for n, p in loaded.named_parameters() if ".lora_" not in n}
    assert flags == {n: p.requires_grad for n, p in base.named_parameters()}
    plain = plain_twin(tiny_model())
    plain.load_state_dict({n: base.state_dict()[n] for n in plain.state_dict()})
    ids, mask = ragged_prompts((80, 12))
    for keep in (0, 1, 2):
        with torch.no_grad():
            theirs = plain(ids, attention_mask=mask, logits_to_keep=keep).logits
            ours = loaded(ids, attention_mask=mask, logits_to_keep=keep, compression=False).logits
        assert torch.equal(ours, theirs)


def test_without_the_adapter_on_request(tmp_path, saved):
    model, folder = saved
    base = AutoModelForCausalLM.from_pretrained(folder, adapter_subfolder=None)
    assert not has_adapter(base)
    assert not torch.allclose(logits(base), logits(model), atol=0.1)
    base.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter").exists()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(base))


def base_states(model):
    ids, mask = ragged_prompts((80, 60))
    with torch.no_grad():
        return model(ids, attention_mask=mask, compression=True).last_hidden_state


def test_the_base_model_class(tmp_path, saved):
    model, folder = saved
    base = AutoModel.from_pretrained(folder)
    assert has_adapter(base)
    torch.testing.assert_close(base_states(base), base_states(model.model))
    base.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(base_states(again), base_states(base))


def test_a_saved_base_model_loads_with_a_tied_head(tmp_path):
    """As plain checkpoints do: a tied head needs no weight of its own."""
    model = adapted_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "whole")
    AutoModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.testing.assert_close(logits(loaded), logits(model))


def test_a_checkpoint_in_a_subfolder(saved):
    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder.parent, subfolder=folder.name)
    torch.testing.assert_close(logits(loaded), logits(model))


def test_peft_is_asked_for_by_name(saved, monkeypatch):
    _, folder = saved
    monkeypatch.setattr(adapter_semtoken, "is_peft_available", lambda: False)
    with pytest.raises(ImportError, match=r"install `peft`.*adapter_subfolder=None"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert not has_adapter(AutoModelForCausalLM.from_pretrained(folder, adapter_subfolder=None))


def test_the_shipped_code_needs_no_peft(saved):
    """From the Hub, Transformers refuses to load a folder whose code imports anything that is not installed."""
    wanted = {package for file in saved[1].glob("*.py") for package in get_imports(file)}
    assert {"torch", "transformers"} <= wanted
    assert "peft" not in wanted


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(tmp_path, saved, name):
    shutil.copytree(saved[1], tmp_path / "copy")
    (tmp_path / "copy" / "adapter" / name).unlink()
    with pytest.raises(OSError, match=name):
        AutoModelForCausalLM.from_pretrained(tmp_path / "copy")


@pytest.mark.parametrize("change", ["one less", "another name"])
def test_an_adapter_of_another_model_is_refused(tmp_path, saved, change):
    shutil.copytree(saved[1], tmp_path / "copy")
    state = load_file(tmp_path / "copy" / WEIGHTS)
    name = next(iter(state))
    tensor = state.pop(name)
    if change == "another name":
        state[name.replace("layers.0", "layers.9").replace("layers.1", "layers.9")] = tensor
    save_file(state, tmp_path / "copy" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(OSError, match="does not fit"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "copy")


# Read in fresh interpreters, where this package does not exist.
CHILD = """
import json, sys
folder, plain, peft, text = sys.argv[1:]
if peft == "without":
    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "peft":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    import importlib.util
    find_spec = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *a: None if name == "peft" else find_spec(name, *a)
    sys.meta_path.insert(0, Missing())
    from transformers.utils import is_peft_available
    assert not is_peft_available()
from transformers import AutoModelForCausalLM, AutoTokenizer
remote = {"trust_remote_code": True}
tokenizer = AutoTokenizer.from_pretrained(folder, **remote)
encoding = tokenizer(text, return_tensors="pt")
def run(folder, **arguments):
    model = AutoModelForCausalLM.from_pretrained(folder, **remote, **arguments).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    return [model.generate(**encoding, max_new_tokens=6, **a).tolist() for a in ({}, {"compression": False})]
assert ("peft" in sys.modules) <= (peft == "with")
facts = {"plain": run(plain), "base": run(folder, adapter_subfolder=None)}
try:
    facts["adapted"] = run(folder)
except ImportError as error:
    facts["adapted"] = str(error)
print("FACTS" + json.dumps(facts))
"""


@pytest.mark.slow
@pytest.mark.parametrize("peft", ["with", "without"])
def test_remote_code(tmp_path, saved, peft):
    """The folder carries its own code; who has no PEFT loads every checkpoint but the adapter."""
    model, folder = saved
    plain = tiny_model()
    plain.save_pretrained(tmp_path / "plain")
    facts = run_clean(CHILD, folder, tmp_path / "plain", peft, TEXT, home=tmp_path / "home")
    encoding = tiny_tokenizer()(TEXT, return_tensors="pt")

    def run(model):
        return [model.generate(**encoding, max_new_tokens=6, **a).tolist() for a in ({}, {"compression": False})]

    base = AutoModelForCausalLM.from_pretrained(folder, adapter_subfolder=None)
    assert facts["plain"] == run(plain)
    assert facts["base"] == run(base)
    if peft == "with":
        assert facts["adapted"] == run(model)
        assert facts["adapted"] != facts["base"]
    else:
        assert "install `peft`" in facts["adapted"]
