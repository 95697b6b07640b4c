"""Law 9: the saved folder carries its own code and re-saves itself, where this package does not exist."""

import ast
import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.dynamic_module_utils import get_relative_imports

from semtoken_hf import SemTokenFastTokenizer
from tests.fixtures.children import run_clean
from tests.fixtures.tiny import BERT, FAMILIES, LLAMA, random_ids, tiny_model, tiny_tokenizer

TEXT = "the cat sat on the mat and the dog ran to the man " * 6
# Read in a fresh interpreter: `facts` is what parent and child must agree on.
CHILD = """
import json, sys
try:
    import semtoken_hf
    sys.exit("the package can be imported")
except ImportError:
    pass
import pathlib
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
folders, again, text = sys.argv[1:]
remote = {"trust_remote_code": True}
facts = {}
for folder in sorted(pathlib.Path(folders).iterdir()):
    config = AutoConfig.from_pretrained(folder, **remote)
    base = AutoModel.from_pretrained(folder, **remote).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, **remote)
    model = AutoModelForCausalLM.from_pretrained(folder, **remote).eval()
    encoding = tokenizer(text, return_tensors="pt")
    outputs = model.generate(**encoding, max_new_tokens=6, return_dict_in_generate=True)
    states = base(**encoding, compression=True)
    pipe = pipeline("text-generation", model=str(folder), tokenizer=str(folder), device="cpu", **remote)
    facts[folder.name] = {
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
        "frozen": not any(p.requires_grad for p in model.base_model.semantic_encoder.parameters()),
    }
    modules = [type(o).__module__ for o in (config, base, tokenizer, model, outputs.past_key_values)]
    assert all(m.startswith("transformers_modules.") for m in modules), modules
    model.save_pretrained(pathlib.Path(again, folder.name))
    tokenizer.save_pretrained(pathlib.Path(again, folder.name))
assert not any(m == "semtoken_hf" or m.startswith("semtoken_hf.") for m in sys.modules if sys.modules[m])
print("FACTS" + json.dumps(facts))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every family's model, the tokenizer, and the folder of the folders they were saved to."""
    folder, tokenizer = tmp_path_factory.mktemp("remote") / "first", tiny_tokenizer()
    models = {f: tiny_model(family=f, encoder_config=dict(BERT), encoder_window=48) for f in FAMILIES}
    for family, model in models.items():
        model.save_pretrained(folder / family)
        tokenizer.save_pretrained(folder / family)
    return models, tokenizer, folder


def facts_of(model, tokenizer):
    """What the child says, computed here."""
    encoding = tokenizer(TEXT, return_tensors="pt")
    outputs = model.generate(**encoding, max_new_tokens=6, return_dict_in_generate=True)
    prompt = model.compress(**encoding)
    assert prompt.is_merged
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    return {
        "config": model.config.model_type,
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


@pytest.mark.slow
def test_loads_and_saves_itself_where_the_package_is_missing(saved):
    """One process loads every family and saves it again, a second one starts from what the first has saved."""
    models, tokenizer, folder = saved
    again, third = folder.parent / "again", folder.parent / "third"
    expected = {family: facts_of(model, tokenizer) for family, model in models.items()}
    assert run_clean(CHILD, folder, again, TEXT, home=folder.parent / "home1") == expected
    assert run_clean(CHILD, again, third, TEXT, home=folder.parent / "home2") == expected
    for family in models:
        code = [{p.name: p.read_text() for p in (f / family).glob("*.py")} for f in (folder, again, third)]
        assert code[0] == code[1] == code[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_code_is_flat(saved, family):
    folder = saved[2] / family
    files = {path.stem: path for path in folder.glob("*.py")}
    assert not [path for path in folder.rglob("*.py") if path.parent != folder]
    entry = {f"modeling_semtoken_{family}", f"configuration_semtoken_{family}", "tokenization_semtoken_fast"}
    assert entry <= set(files)
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
    assert set(files) == imported | entry


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_map(saved, family):
    folder, name = saved[2] / family, type(saved[0][family]).__name__.removesuffix("ForCausalLM")
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map.pop("AutoConfig") == f"configuration_semtoken_{family}.{name}Config"
    assert {"AutoModel", "AutoModelForCausalLM"} <= auto_map.keys()
    for auto_class, path in auto_map.items():
        assert (
            path
            == f"modeling_semtoken_{family}.{name}{auto_class.removeprefix('Auto').removeprefix('Model') or 'Model'}"
        )
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert "tokenization_semtoken_fast.SemTokenFastTokenizer" in tokenizer["auto_map"]["AutoTokenizer"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_hold_the_encoder(tmp_path, dtype):
    model = tiny_model(dtype=dtype, encoder_config=dict(BERT), encoder_window=48)
    model.save_pretrained(tmp_path)
    encoder, prefix = model.base_model.semantic_encoder.state_dict(), model.base_model_prefix
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())
        for name, weight in encoder.items():
            stored = file.get_tensor(f"{prefix}.semantic_encoder.{name}")
            assert stored.dtype == torch.float32
            assert torch.equal(stored, weight)
        assert file.get_tensor("lm_head.weight").dtype == dtype


@pytest.mark.parametrize("fields", [{"tie_word_embeddings": True}, {}], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loads_with_the_package(tmp_path, family, fields):
    """Without `trust_remote_code`, in shards."""
    model, tokenizer = tiny_model(family=family, **fields), tiny_tokenizer()
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded, loaded_tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert type(loaded_tokenizer) is SemTokenFastTokenizer
    encoding = loaded_tokenizer(TEXT, return_tensors="pt", return_span_ids=True)
    assert torch.equal(encoding["span_ids"], model.compress(encoding["input_ids"]).span_ids)
    expected = model.generate(encoding["input_ids"], max_new_tokens=4)
    assert torch.equal(loaded.generate(**encoding, max_new_tokens=4), expected)


@pytest.mark.parametrize("vocabulary", [LLAMA["vocab_size"] + 9, 250])
@pytest.mark.parametrize("family", FAMILIES)
def test_resized_vocabulary(tmp_path, family, vocabulary):
    model = tiny_model(family=family)
    model.resize_token_embeddings(vocabulary)
    ids = random_ids(1, 48) % 200
    ids[0, 10:14] = vocabulary - 1
    outputs = model.generate(ids, max_new_tokens=4, return_dict_in_generate=True)
    assert outputs.past_key_values.is_compressed
    assert not any(p.requires_grad for p in model.base_model.semantic_encoder.parameters())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.generate(ids, max_new_tokens=4), outputs.sequences)
