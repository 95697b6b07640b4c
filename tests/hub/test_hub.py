"""`push_to_hub` and `from_pretrained` by Hub id: the real client against a loopback Hub.

Loading is done in a fresh interpreter where this package does not exist, from a private repository, by a pinned
revision: weights, code, adapter and planner of that revision.
"""

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
from tests.hub.hub_server import OWNER, READER, STRANGER, HubServer

TEXT = "the cat sat on the mat and the dog ran to the man " * 6
MODULE = "modeling_semtoken_llama.py"
# Two revisions of one repository: other weights, another ratio, other code.
RATIOS = {"first": 2.4, "second": 4.0}


def make_model(name):
    return tiny_model(seed=list(RATIOS).index(name), target_ratio=RATIOS[name])


def folder_bytes(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def without_loading_notes(files):
    """Transformers writes into tokenizer_config.json how the tokenizer was loaded."""
    tokenizer = json.loads(files["tokenizer_config.json"])
    notes = {name: tokenizer.pop(name, False) for name in ("is_local", "local_files_only")}
    assert notes == dict.fromkeys(notes, False)
    return {**files, "tokenizer_config.json": tokenizer}


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """A Hub with `me/tiny` (two revisions, a tag and a branch on the first) and `me/adapted`, both private."""
    root = tmp_path_factory.mktemp("pushed")
    with HubServer() as hub, pytest.MonkeyPatch.context() as patch:
        use_hub(patch, hub, root / "cache", OWNER)
        for name in RATIOS:
            make_model(name).push_to_hub("me/tiny", private=True)
            tiny_tokenizer().push_to_hub("me/tiny")
            code = hub.repositories["me/tiny"].files()[MODULE] + f"PUSHED = {name!r}\n".encode()
            HfApi().upload_file(path_or_fileobj=code, path_in_repo=MODULE, repo_id="me/tiny")
            if name == "first":
                HfApi().create_tag("me/tiny", tag="v1")
                HfApi().create_branch("me/tiny", branch="release/1")
        adapted_model().save_pretrained(root / "adapted", push_to_hub=True, repo_id="me/adapted", private=True)
        tiny_tokenizer().save_pretrained(root / "adapted", push_to_hub=True, repo_id="me/adapted")
        HfApi().create_tag("me/adapted", tag="v1")
        HfApi().delete_file("adapter/adapter_model.safetensors", repo_id="me/adapted")
        yield hub
    assert hub.unknown == []


CHILD = """
import json, os, sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
task = json.loads(sys.argv[1])
def load(repo, **hub):
    hub["trust_remote_code"] = True
    return AutoModelForCausalLM.from_pretrained(repo, **hub).eval(), AutoTokenizer.from_pretrained(repo, **hub)
def facts(repo, **hub):
    model, tokenizer = load(repo, **hub)
    encoding = tokenizer(task["text"], return_tensors="pt", return_span_ids=True)
    outputs = model.generate(**encoding, max_new_tokens=6, return_dict_in_generate=True)
    modules = {type(o).__module__.rsplit(".", 1)[0] for o in (model, tokenizer, outputs.past_key_values)}
    assert all(m.startswith("transformers_modules.me.") for m in modules), modules
    return {
        "sequences": outputs.sequences.tolist(),
        "slots": outputs.past_key_values.compressed_lengths.tolist(),
        "span_ids": encoding["span_ids"].tolist(),
        "code": getattr(sys.modules[type(model).__module__], "PUSHED", None),
        "commits": sorted({m.rsplit(".", 1)[1].lstrip("_") for m in modules}),
    }
def refused(repo, **hub):
    try:
        load(repo, **hub)
    except OSError as error:
        return str(error)
for source, target in task["push"].items():
    for part in load(source, **task["remote"]):
        part.push_to_hub(target, private=True, token=task["owner"])
result = {name: facts(repo, **hub) for name, (repo, hub) in task["load"].items()}
result |= {name: refused(repo, **hub) for name, (repo, hub) in task["refuse"].items()}
remote = {"trust_remote_code": True, **task["remote"]}
result["ratios"] = {r: AutoConfig.from_pretrained("me/tiny", revision=r, **remote).target_ratio for r in task["ratios"]}
print("FACTS" + json.dumps(result))
"""


def run_child(hub, home, offline=False, **task):
    task = {"text": TEXT, "owner": OWNER, "load": {}, "refuse": {}, "ratios": [], "push": {}, "remote": {}, **task}
    variables = {**hub.variables, **({"HF_HUB_OFFLINE": "1"} if offline else {})}
    return run_clean(CHILD, json.dumps(task), home=home, variables=variables)


def expected_facts(model, commit, code=None):
    encoding = tiny_tokenizer()(TEXT, return_tensors="pt")
    prompt = model.compress(**encoding)
    assert prompt.is_merged
    sequences = model.generate(**encoding, max_new_tokens=6)
    return {
        "sequences": sequences.tolist(),
        "slots": [int(prompt.kept_lengths) + 5],
        "span_ids": prompt.span_ids.tolist(),
        "code": code,
        "commits": [commit],
    }


@pytest.mark.slow
def test_a_clean_process_loads_what_was_pushed(pushed, tmp_path):
    """The pinned older revision, main, an adapter; pushed again from there; and from the cache, by another process."""
    tiny, adapted = pushed.repositories["me/tiny"], pushed.repositories["me/adapted"]
    reader, first = {"token": READER}, tiny.tags["v1"]
    found = run_child(
        pushed,
        tmp_path,
        load={
            "pinned": ("me/tiny", {"revision": first, **reader}),
            "main": ("me/tiny", reader),
            "again": ("me/again", reader),
            "adapted": ("me/adapted", {"revision": adapted.tags["v1"], **reader}),
        },
        refuse={
            "anonymous": ("me/tiny", {"revision": "v1"}),
            "stranger": ("me/tiny", {"revision": "v1", "token": STRANGER}),
            "no such revision": ("me/tiny", {"revision": "v2", **reader}),
            "half an adapter": ("me/adapted", reader),
        },
        remote=reader,
        ratios=[first, "v1", "release/1", "main"],
        push={"me/tiny": "me/again"},
    )
    assert found["pinned"] == expected_facts(make_model("first"), first, "first")
    assert found["main"] == expected_facts(make_model("second"), tiny.branches["main"], "second")
    assert found["adapted"] == expected_facts(adapted_model(), adapted.tags["v1"])
    assert found["pinned"]["slots"] != found["main"]["slots"]
    for name in ("anonymous", "stranger"):
        assert "me/tiny is not a local folder and is not a valid model identifier" in found[name]
    assert "v2 is not a valid git identifier" in found["no such revision"]
    assert "adapter_model.safetensors" in found["half an adapter"]
    assert found["ratios"] == {first: 2.4, "v1": 2.4, "release/1": 2.4, "main": 4.0}
    again = pushed.repositories["me/again"]
    assert again.private
    assert without_loading_notes(again.files()) == without_loading_notes(tiny.files())
    assert found["again"] == expected_facts(make_model("second"), again.branches["main"], "second")
    requests = len(pushed.requests)
    cached = {"pinned": ("me/tiny", {"revision": first}), "again": ("me/again", {})}
    offline = run_child(pushed, tmp_path, offline=True, load=cached)
    assert {name: offline[name] for name in cached} == {name: found[name] for name in cached}
    assert pushed.requests[requests:] == []


@pytest.mark.parametrize("kind", ["single", "sharded", "adapted"])
@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
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
    assert all(token is None for _, path, token in hub.requests if path.startswith(("/cdn", "/lfs/")))


def test_a_push_to_a_branch(hub):
    tiny_model().push_to_hub("me/model", revision="next")
    repository = hub.repositories["me/model"]
    assert not repository.private  # as in Transformers; scripts/push_to_hub.py is private by default
    assert repository.files("main") == {}
    assert "model.safetensors" in repository.files("next")
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained("me/model", revision="next").lm_head.weight, tiny_model().lm_head.weight
    )


def test_a_failed_push_leaves_nothing(hub):
    hub.refuse = ("PUT", "/lfs/")
    with pytest.raises(RuntimeError, match=r"uploading 'model\.safetensors'"):
        tiny_model().push_to_hub("me/model")
    assert hub.repositories["me/model"].files() == {}
