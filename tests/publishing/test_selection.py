"""What goes to the Hub and what stays, and folders that are no whole checkpoint."""

from __future__ import annotations

import json
import os

import pytest
from safetensors.torch import load_file, save_file

from semtoken_hf.publishing.selection import select_files

MODULES = {"modeling_semtoken_llama.py", "configuration_semtoken_llama.py", "tokenization_semtoken_fast.py"}
CARD = """# A card

![shown](plots/shown.png) [a page](details.md#part) <img src="plots/tag.png"> [site](https://example.org/x.png)
[secret](.hidden/key.json) [above](../above.md) [weights](other.safetensors) [root](/etc/hostname.md) ![](gone.png)
"""


def write(folder, files):
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)


def test_everything_that_was_saved_is_sent(make_checkpoint):
    for kind in ("single", "sharded", "adapted"):
        folder = make_checkpoint(kind, kind)
        selection = select_files(folder)
        saved = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        # PEFT writes a page of its own beside the adapter's files.
        assert saved - {"adapter/README.md"} == set(selection.files)
        assert set(selection.left_out) <= {"adapter/README.md"}
        assert set(selection.files) >= MODULES
        assert all(file.read_bytes() == (folder / path).read_bytes() for path, file in selection.files.items())
    assert len([path for path in select_files(folder.parent / "sharded").files if ".safetensors" in path]) > 3
    assert {p for p in selection.files if "/" in p} == {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    }


def test_the_card_takes_what_it_shows(make_checkpoint):
    folder = make_checkpoint()
    before = set(select_files(folder).files)
    pictures = {f"plots/{name}.png": "pixels" for name in ("shown", "tag", "unused", "of-the-page")}
    pages = {"README.md": CARD, "details.md": "![](plots/of-the-page.png) [back](README.md)", "notes.md": "mine"}
    write(folder, {**pictures, **pages, "LICENSE": "free", "other.safetensors": "", ".hidden/key.json": "{}"})
    write(folder.parent, {"above.md": "mine"})
    selection = select_files(folder)
    shown = {"README.md", "details.md", "LICENSE", "plots/shown.png", "plots/tag.png", "plots/of-the-page.png"}
    assert set(selection.files) - before == shown
    assert set(selection.left_out) == {"plots/unused.png", "notes.md", "other.safetensors", ".hidden/"}
    assert selection.left_out["other.safetensors"] == "no weights that config.json and the index load"


def test_optional_files_of_the_tokenizer_and_of_generation(make_checkpoint):
    folder = make_checkpoint()
    before = set(select_files(folder).files)
    more = {"chat_template.jinja", "additional_chat_templates/tool.jinja", "added_tokens.json", "tokenizer.model"}
    write(folder, dict.fromkeys(more, "x"))
    assert set(select_files(folder).files) - before == more


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("pytorch_model.bin", "pickle"),
        ("training_args.bin", "pickle"),
        ("trainer_state.json", "not read"),
        ("checkpoint-10/model.safetensors", "no weights"),
        ("scratch.py", "no module"),
        ("__pycache__/compression.cpython-311.pyc", "cache"),
        (".env", "hidden"),
        ("adapter/adapter_model.safetensors", "no weights"),
    ],
)
def test_never_sent(make_checkpoint, path, reason):
    """Not even where the card links to it."""
    folder = make_checkpoint()
    before = set(select_files(folder).files)
    write(folder, {path: "x", "README.md": "[a](%s)" % ("" if reason == "not read" else path)})
    selection = select_files(folder)
    assert set(selection.files) == before | {"README.md"}
    (left,) = selection.left_out.items()
    assert left[0] in (path, path.split("/")[0] + "/")
    assert reason in left[1]


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_links(make_checkpoint):
    folder = make_checkpoint()
    write(folder.parent, {"outside/secret.md": "secret", "outside/more/key.md": "secret"})
    write(folder, {"README.md": "[a](inner.md) [b](outer.md) [c](linked/key.md)", "page.md": "mine"})
    (folder / "inner.md").symlink_to("page.md")
    (folder / "outer.md").symlink_to(folder.parent / "outside" / "secret.md")
    (folder / "LICENSE").symlink_to(folder.parent / "outside" / "secret.md")
    (folder / "added_tokens.json").symlink_to(folder.parent / "outside" / "secret.md")
    (folder / "linked").symlink_to(folder.parent / "outside" / "more")
    selection = select_files(folder)
    assert "inner.md" in selection.files
    outside = "a link to outside the folder"
    expected = {"outer.md": outside, "LICENSE": outside, "added_tokens.json": outside, "linked": "a link to a folder"}
    assert selection.left_out == {**expected, "page.md": "not read by from_pretrained, not shown by the card"}
    (folder / "config.json").rename(folder.parent / "config.json")
    (folder / "config.json").symlink_to(folder.parent / "config.json")
    with pytest.raises(ValueError, match=r"config\.json .* is a link to outside"):
        select_files(folder)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("single", "config.json"),
        ("single", "tokenizer.json"),
        ("single", "span_clustering.py"),
        ("sharded", "model-00002-of-00008.safetensors"),
        ("adapted", "adapter/adapter_model.safetensors"),
    ],
)
def test_a_missing_file_is_named(make_checkpoint, kind, name):
    folder = make_checkpoint(kind)
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name.replace(".", r"\.")):
        select_files(folder)


def change_json(folder, name, **fields):
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**content, **fields}))


def test_other_folders_are_refused(make_checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        select_files(tmp_path / "nothing")
    folder = make_checkpoint(name="plain")
    change_json(folder, "config.json", model_type="llama", auto_map=None)
    with pytest.raises(ValueError, match=r"no converted checkpoint \(model_type 'llama'"):
        select_files(folder)
    folder = make_checkpoint(name="foreign")
    change_json(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["you/x--tokenization.Fast", None]})
    with pytest.raises(ValueError, match=r"code of another repository \(you/x--"):
        select_files(folder)


def test_weights_are_looked_into(make_checkpoint):
    folder = make_checkpoint()
    state, path = load_file(folder / "model.safetensors"), folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        select_files(folder)
    save_file({name: t for name, t in state.items() if "semantic_encoder" not in name}, path)
    with pytest.raises(ValueError, match="hold no semantic encoder"):
        select_files(folder)
    change_json(folder, "config.json", segmentation_mode="uniform")
    assert "model.safetensors" in select_files(folder).files
    save_file({name: t for name, t in state.items() if "semantic_encoder" in name}, path)
    with pytest.raises(ValueError, match="hold no language model"):
        select_files(folder)
    save_file(state, path)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="keep the one that counts"):
        select_files(folder)


def test_json_of_another_kind_is_refused(make_checkpoint):
    folder = make_checkpoint()
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json in .* is no JSON object"):
        select_files(folder)
