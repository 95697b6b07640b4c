"""Law 9: the saved folder carries its own code and re-saves itself, where this package does not exist."""

import ast
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.dynamic_module_utils import get_relative_imports

from semtoken_hf import SemTokenFastTokenizer, SemTokenLlamaForCausalLM
from tests.fixtures.tiny import BERT, tiny_model, tiny_tokenizer

TEXT = "the cat sat on the mat and the dog ran to the man " * 6
# Read in a fresh interpreter: `facts` is what parent and child must agree on.
CHILD = """
import json, sys
sys.modules["semtoken_hf"] = None
try:
    import semtoken_hf
    sys.exit("the package can be imported")
except ImportError:
    pass
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
folder, again, text = sys.argv[1:]
remote = {"trust_remote_code": True}
config = AutoConfig.from_pretrained(folder, **remote)
base = AutoModel.from_pretrained(folder, **remote).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, **remote)
model = AutoModelForCausalLM.from_pretrained(folder, **remote).eval()
encoding = tokenizer(text, return_tensors="pt")
outputs = model.generate(**encoding, max_new_tokens=6, return_dict_in_generate=True)
states = base(**encoding, compression=True)
pipe = pipeline("text-generation", model=folder, tokenizer=folder, device="cpu", **remote)
facts = {
    "config": config.model_type,
    "ids": encoding["input_ids"].tolist(),
    "sequences": outputs.sequences.tolist(),
    "slots": outputs.past_key_values.slot_lengths.tolist(),
    "length": outputs.past_key_values.get_seq_length(),
    "span_ids": model.compress(**encoding).span_ids.tolist(),
    "planned": tokenizer(text, return_span_ids=True)["span_ids"],
    "states": states.last_hidden_state.shape[1],
    "ratio": model.generate(**encoding, max_new_tokens=4, target_ratio=4.0, num_beams=2).tolist(),
    "text": pipe(text, max_new_tokens=6, do_sample=False)[0]["generated_text"],
    "frozen": not any(p.requires_grad for p in model.model.semantic_encoder.parameters()),
}
modules = [type(o).__module__ for o in (config, base, tokenizer, model, outputs.past_key_values)]
assert all(m.startswith("transformers_modules.") for m in modules), modules
assert not any(m == "semtoken_hf" or m.startswith("semtoken_hf.") for m in sys.modules if sys.modules[m])
model.save_pretrained(again)
tokenizer.save_pretrained(again)
print("FACTS" + json.dumps(facts))
"""


def run_child(folder, again, home):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    for name in ("HF_MODULES_CACHE", "HF_HUB_CACHE", "TRANSFORMERS_CACHE"):
        environment.pop(name, None)
    home.mkdir()
    command = [sys.executable, "-I", "-c", CHILD, str(folder), str(again), TEXT]
    result = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.split("FACTS")[1])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The parent's model and tokenizer, and the folder they were saved to."""
    folder = tmp_path_factory.mktemp("remote") / "first"
    model = tiny_model(encoder_config=dict(BERT), encoder_window=48)
    tokenizer = tiny_tokenizer()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer, folder


@pytest.mark.slow
def test_loads_and_saves_itself_where_the_package_is_missing(saved):
    """One process loads the folder and saves it again, a second one starts from what the first has saved."""
    model, tokenizer, folder = saved
    again, third = folder.parent / "again", folder.parent / "third"
    encoding = tokenizer(TEXT, return_tensors="pt")
    outputs = model.generate(**encoding, max_new_tokens=6, return_dict_in_generate=True)
    prompt = model.compress(**encoding)
    assert prompt.is_merged
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    expected = {
        "config": "semtoken_llama",
        "ids": encoding["input_ids"].tolist(),
        "sequences": outputs.sequences.tolist(),
        "slots": outputs.past_key_values.slot_lengths.tolist(),
        "length": outputs.sequences.shape[1] - 1,
        "span_ids": prompt.span_ids.tolist(),
        "planned": prompt.span_ids[0].tolist(),
        "states": int(prompt.kept_lengths),
        "ratio": model.generate(**encoding, max_new_tokens=4, target_ratio=4.0, num_beams=2).tolist(),
        "text": pipe(TEXT, max_new_tokens=6, do_sample=False)[0]["generated_text"],
        "frozen": True,
    }
    assert run_child(folder, again, folder.parent / "home1") == expected
    assert run_child(again, third, folder.parent / "home2") == expected
    code = [{p.name: p.read_text() for p in f.glob("*.py")} for f in (folder, again, third)]
    assert code[0] == code[1] == code[2]


def test_code_is_flat(saved):
    folder = saved[2]
    files = {path.stem: path for path in folder.glob("*.py")}
    assert not [path for path in folder.rglob("*.py") if path.parent != folder]
    assert {"modeling_semtoken_llama", "configuration_semtoken_llama", "tokenization_semtoken_fast"} <= set(files)
    imported = set()
    for name, path in files.items():
        relative = set()
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""] if node.level == 0 else []
                if node.level:
                    assert node.level == 1, name
                    assert node.module in files, (name, node.module)
                    relative.add(node.module)
            assert not any(n.split(".")[0] == "semtoken_hf" for n in names), name
        # Transformers finds them by pattern, in comments and docstrings too.
        assert set(get_relative_imports(path)) == relative, name
        imported |= relative
    entry = {"modeling_semtoken_llama", "configuration_semtoken_llama", "tokenization_semtoken_fast"}
    assert set(files) == imported | entry


def test_auto_map(saved):
    folder = saved[2]
    assert json.loads((folder / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_semtoken_llama.SemTokenLlamaConfig",
        "AutoModel": "modeling_semtoken_llama.SemTokenLlamaModel",
        "AutoModelForCausalLM": "modeling_semtoken_llama.SemTokenLlamaForCausalLM",
    }
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert "tokenization_semtoken_fast.SemTokenFastTokenizer" in tokenizer["auto_map"]["AutoTokenizer"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_hold_the_encoder(tmp_path, dtype):
    model = tiny_model(dtype=dtype, encoder_config=dict(BERT), encoder_window=48)
    model.save_pretrained(tmp_path)
    encoder = model.model.semantic_encoder.state_dict()
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())
        for name, weight in encoder.items():
            stored = file.get_tensor(f"model.semantic_encoder.{name}")
            assert stored.dtype == torch.float32
            assert torch.equal(stored, weight)
        assert file.get_tensor("lm_head.weight").dtype == dtype


@pytest.mark.parametrize("fields", [{"tie_word_embeddings": True}, {}], ids=["tied", "untied"])
def test_loads_with_the_package(tmp_path, fields):
    """Without `trust_remote_code`, in shards."""
    model, tokenizer = tiny_model(**fields), tiny_tokenizer()
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded, loaded_tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is SemTokenLlamaForCausalLM
    assert type(loaded_tokenizer) is SemTokenFastTokenizer
    encoding = loaded_tokenizer(TEXT, return_tensors="pt", return_span_ids=True)
    assert torch.equal(encoding["span_ids"], model.compress(encoding["input_ids"]).span_ids)
    expected = model.generate(encoding["input_ids"], max_new_tokens=4)
    assert torch.equal(loaded.generate(**encoding, max_new_tokens=4), expected)
