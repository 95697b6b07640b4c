"""`push_to_hub` and `from_pretrained` by Hub id: the real client against a loopback Hub."""

from __future__ import annotations

import json

import pytest
import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.fixtures.adapted import adapted_model
from tests.fixtures.children import run_clean
from tests.fixtures.tiny import tiny_model, tiny_tokenizer
from tests.hub.client import use_hub
from tests.hub.hub_server import OWNER, READER, HubServer

TEXT = "the cat sat on the mat and the dog ran to the man " * 6
MODULE = "modeling_semtoken_llama.py"
# Two revisions of one repository: other weights, another ratio, other code.
RATIOS = {"first": 2.4, "second": 4.0}


def make_model(name):
    return tiny_model(seed=list(RATIOS).index(name), target_ratio=RATIOS[name])


def folder_bytes(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """A Hub with `me/tiny` (two revisions, a tag on the first) and `me/adapted`, both private."""
    root = tmp_path_factory.mktemp("pushed")
    with HubServer() as hub, pytest.MonkeyPatch.context() as patch:
        use_hub(patch, hub, root / "cache", OWNER)
        for name in RATIOS:
            make_model(name).push_to_hub("me/tiny", private=True)
            tiny_tokenizer().push_to_hub("me/tiny")
            tiny = hub.repositories["me/tiny"]
            code = tiny.files()[MODULE] + f"PUSHED = {name!r}\n".encode()
            HfApi().upload_file(path_or_fileobj=code, path_in_repo=MODULE, repo_id="me/tiny")
            tiny.tags.setdefault("v1", tiny.branches["main"])
        adapted_model().save_pretrained(root / "adapted", push_to_hub=True, repo_id="me/adapted", private=True)
        tiny_tokenizer().save_pretrained(root / "adapted", push_to_hub=True, repo_id="me/adapted")
        yield hub


CHILD = """
import json, os, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
task = json.loads(sys.argv[1])
def facts(repo, **hub):
    hub |= {"trust_remote_code": True}
    model, tokenizer = (c.from_pretrained(repo, **hub) for c in (AutoModelForCausalLM, AutoTokenizer))
    encoding = tokenizer(task["text"], return_tensors="pt", return_span_ids=True)
    outputs = model.eval().generate(**encoding, max_new_tokens=6, return_dict_in_generate=True)
    modules = {type(o).__module__.rsplit(".", 1)[0] for o in (model, tokenizer, outputs.past_key_values)}
    assert all(m.startswith("transformers_modules.me.") for m in modules), modules
    return {
        "sequences": outputs.sequences.tolist(),
        "slots": outputs.past_key_values.compressed_lengths.tolist(),
        "span_ids": encoding["span_ids"].tolist(),
        "code": getattr(sys.modules[type(model).__module__], "PUSHED", None),
        "commits": sorted({m.rsplit(".", 1)[1].lstrip("_") for m in modules}),
    }
print("FACTS" + json.dumps({name: facts(repo, **hub) for name, (repo, hub) in task["load"].items()}))
"""


def run_child(hub, home, load, offline=False):
    variables = {**hub.variables, **({"HF_HUB_OFFLINE": "1"} if offline else {})}
    return run_clean(CHILD, json.dumps({"text": TEXT, "load": load}), home=home, variables=variables)


def expected_facts(model, commit, code=None):
    encoding = tiny_tokenizer()(TEXT, return_tensors="pt")
    prompt = model.compress(**encoding)
    assert prompt.is_merged
    return {
        "sequences": model.generate(**encoding, max_new_tokens=6).tolist(),
        "slots": [int(prompt.kept_lengths) + 5],
        "span_ids": prompt.span_ids.tolist(),
        "code": code,
        "commits": [commit],
    }


@pytest.mark.slow
def test_a_clean_process_loads_what_was_pushed(pushed, tmp_path):
    """Weights, code, adapter and planner of a pinned older revision, and of main; then from the cache alone."""
    tiny, adapted = pushed.repositories["me/tiny"], pushed.repositories["me/adapted"]
    reader, first = {"token": READER}, tiny.tags["v1"]
    load = {
        "pinned": ("me/tiny", {"revision": first, **reader}),
        "main": ("me/tiny", reader),
        "adapted": ("me/adapted", reader),
    }
    found = run_child(pushed, tmp_path, load)
    assert found["pinned"] == expected_facts(make_model("first"), first, "first")
    assert found["main"] == expected_facts(make_model("second"), tiny.branches["main"], "second")
    assert found["adapted"] == expected_facts(adapted_model(), adapted.branches["main"])
    assert found["pinned"]["slots"] != found["main"]["slots"]
    requests = len(pushed.requests)
    cached = {"pinned": ("me/tiny", {"revision": first})}
    assert run_child(pushed, tmp_path, cached, offline=True) == {"pinned": found["pinned"]}
    assert pushed.requests[requests:] == []


@pytest.mark.parametrize(("kind", "way"), [("sharded", "push_to_hub"), ("adapted", "save_pretrained")])
def test_what_arrives_is_what_save_pretrained_writes(hub, tmp_path, kind, way):
    """Byte for byte, in one commit for the model and one for the tokenizer; then it loads by its id."""
    model, tokenizer = adapted_model() if kind == "adapted" else tiny_model(), tiny_tokenizer()
    size = {"max_shard_size": "60KB" if kind == "sharded" else "5GB"}
    if way == "push_to_hub":
        model.push_to_hub("me/model", private=True, commit_message="the model", **size)
        tokenizer.push_to_hub("me/model", commit_message="the tokenizer")
    else:
        push = {"push_to_hub": True, "repo_id": "me/model"}
        model.save_pretrained(tmp_path / "sent", private=True, commit_message="the model", **push, **size)
        tokenizer.save_pretrained(tmp_path / "sent", commit_message="the tokenizer", **push)
    model.save_pretrained(tmp_path / "saved", **size)
    tokenizer.save_pretrained(tmp_path / "saved")
    repository = hub.repositories["me/model"]
    assert repository.private
    assert [c.message for c in repository.history()] == ["the tokenizer", "the model", "initial commit"]
    arrived = repository.files()
    assert arrived.pop("README.md").startswith(b"---\nlibrary_name: transformers\n")
    assert arrived == folder_bytes(tmp_path / "saved")
    loaded, loaded_tokenizer = (c.from_pretrained("me/model") for c in (AutoModelForCausalLM, AutoTokenizer))
    encoding = loaded_tokenizer(TEXT, return_tensors="pt", return_span_ids=True)
    assert torch.equal(encoding["span_ids"], model.compress(encoding["input_ids"]).span_ids)
    expected = model.generate(encoding["input_ids"], max_new_tokens=6)
    assert torch.equal(loaded.generate(**encoding, max_new_tokens=6), expected)


def test_a_failed_push_leaves_nothing(hub):
    hub.refuse = ("PUT", "/lfs/")
    with pytest.raises(RuntimeError, match=r"uploading 'model\.safetensors'"):
        tiny_model().push_to_hub("me/model")
    assert hub.repositories["me/model"].files() == {}
