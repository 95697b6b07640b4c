"""Pickle weights: refused, or on request read as tensors alone, whatever else the file would do."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file

from semtoken_hf import SemTokenLlamaForCausalLM, convert_checkpoint
from semtoken_hf.conversion import weights
from semtoken_hf.conversion.pickled_weights import PICKLE, PICKLE_INDEX, read_pickle


def as_pickle(folder, shards=1, **options):
    """The weights of a folder in pickle files instead of safetensors."""
    file = folder / "model.safetensors"
    state = load_file(file)
    file.unlink()
    if shards == 1:
        torch.save(state, folder / PICKLE, **options)
        return folder
    names = [f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" for i in range(shards)]
    weight_map = {name: names[i % shards] for i, name in enumerate(state)}
    for file in names:
        torch.save({n: t for n, t in state.items() if weight_map[n] == file}, folder / file)
    (folder / PICKLE_INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


class Bomb:
    """Unpickling it as pickle does writes the file."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def convert(source, encoder, output, **options):
    return convert_checkpoint(source, encoder, output, progress=False, **options)


@pytest.mark.parametrize("who", ["model", "encoder"])
def test_refused_unless_told(make_llama, encoder_folder, tmp_path, who):
    source = make_llama()
    as_pickle(source if who == "model" else encoder_folder)
    with pytest.raises(FileNotFoundError, match=r"safetensors; pickle weights are not read.*`--allow-pickle`") as found:
        convert(source, encoder_folder, tmp_path / "out")
    assert str(source if who == "model" else encoder_folder) in str(found.value)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("shards", [1, 3])
def test_the_same_checkpoint_as_from_safetensors(make_llama, encoder_folder, tmp_path, shards):
    source = make_llama(dtype=torch.bfloat16)
    safe = convert(source, encoder_folder, tmp_path / "safe", max_shard_size="20KB")
    as_pickle(encoder_folder)
    order = weights.find_tensors
    ours = convert(as_pickle(source, shards), encoder_folder, tmp_path / "ours", allow_pickle=True)
    assert order(ours).keys() == order(safe).keys()
    theirs = SemTokenLlamaForCausalLM.from_pretrained(safe).state_dict()
    for name, tensor in SemTokenLlamaForCausalLM.from_pretrained(ours).state_dict().items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name])
    assert not list(ours.glob("*.bin"))


def test_safetensors_win(make_llama, encoder_folder, tmp_path):
    source = make_llama()
    safe = convert(source, encoder_folder, tmp_path / "safe")
    for folder in (source, encoder_folder):
        torch.save({"bomb": Bomb(tmp_path / "exploded")}, folder / PICKLE)
    both = convert(source, encoder_folder, tmp_path / "both", allow_pickle=True)
    assert contents(both) == contents(safe)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("who", ["model", "encoder"])
def test_a_bomb_does_not_go_off(make_llama, encoder_folder, tmp_path, who):
    source = make_llama()
    folder = source if who == "model" else encoder_folder
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**state, "bomb": Bomb(tmp_path / "exploded")}, folder / PICKLE)
    with pytest.raises(ValueError, match=r"holds more than tensors and was not read; do not trust it"):
        convert(source, encoder_folder, tmp_path / "out", allow_pickle=True)
    assert not (tmp_path / "exploded").exists()
    assert not list(tmp_path.glob("out*"))
    torch.load(folder / PICKLE, weights_only=False)  # it is a real one
    assert (tmp_path / "exploded").exists()


def save_old(content, file):
    torch.save(content, file, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("content", "save", "match"),
    [
        ({"a": torch.ones(2)}, save_old, "before 1.6, which cannot be mapped: write them as safetensors"),
        (Bomb("/nonexistent/exploded"), lambda c, f: f.write_bytes(pickle.dumps(c)), "is damaged, or in the format"),
        ({"state_dict": {"a": torch.ones(2)}}, torch.save, "no plain dict of dense tensors"),
    ],
)
def test_what_is_no_state_dict(tmp_path, content, save, match):
    save(content, tmp_path / PICKLE)
    with pytest.raises(ValueError, match=match):
        read_pickle(tmp_path / PICKLE)


def test_shared_and_transposed_tensors_are_copied(tmp_path):
    table = torch.arange(6.0).view(2, 3)
    state = {"a": torch.nn.Parameter(table), "tied": table, "transposed": table.T}
    torch.save(state, tmp_path / PICKLE)
    stored = weights.find_tensors(tmp_path, allow_pickle=True)
    weights.write_weights(tmp_path, stored, {}, "5GB", False)
    (file,) = tmp_path.glob("*.safetensors")
    found = load_file(file)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd"])
def test_an_index_names_files_of_its_folder_alone(make_llama, encoder_folder, tmp_path, name):
    source = make_llama(max_shard_size="20KB")
    index = source / weights.INDEX
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], name)
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="which is no file of that folder"):
        convert(source, encoder_folder, tmp_path / "out")


def test_pickle_of_a_hub_repository_is_fetched_on_request_alone(make_llama, encoder_folder, hub, tmp_path):
    from huggingface_hub import HfApi

    folder = as_pickle(make_llama())
    HfApi().create_repo("me/pickled")
    for file in folder.iterdir():
        HfApi().upload_file(path_or_fileobj=file.read_bytes(), path_in_repo=file.name, repo_id="me/pickled")
    hub.requests.clear()
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors; pickle weights are not read"):
        convert("me/pickled", encoder_folder, tmp_path / "out")
    assert not any(PICKLE in path for _, path, _ in hub.requests)
    out = convert("me/pickled", encoder_folder, tmp_path / "out", allow_pickle=True)
    assert any(PICKLE in path for _, path, _ in hub.requests)
    assert contents(out) == contents(convert(folder, encoder_folder, tmp_path / "local", allow_pickle=True))
