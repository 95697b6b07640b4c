"""`semtoken push`: what it prints, and mistakes that end with one line."""

from __future__ import annotations

import socket

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from semtoken_hf.publishing.push import prepare
from tests.fixtures.command_line import run_command, run_json
from tests.hub.hub_server import OWNER, STRANGER


def push(*arguments) -> str:
    return run_command("push", *arguments).stdout


def test_a_dry_run_shows_everything_and_asks_nothing(make_checkpoint, hub):
    folder = make_checkpoint()
    (folder / "training_args.bin").write_bytes(b"x")
    out = push(folder, "me/tiny", "--dry-run")
    assert hub.requests == []
    listed, rest = out.split("left out:\n")
    rows = {
        path: int(size.replace(",", ""))
        for size, path in (row.split("  ") for row in map(str.strip, listed.splitlines()) if row)
    }
    total = rows.pop(f"bytes in {len(rows) - 1} files")
    assert total == sum(rows.values())
    sent = {path.name for path in folder.iterdir()} - {"training_args.bin"}
    assert set(rows) == sent | {"README.md"}
    assert all(rows[name] == (folder / name).stat().st_size for name in sent)
    left, card = rest.split("README.md, unless the repository has one already:\n")
    assert left.strip() == "training_args.bin: may be pickle, which runs code when it is loaded"
    assert 'from_pretrained("me/tiny", trust_remote_code=True)' in card
    assert len(card.strip().encode()) == rows["README.md"] - 1


def test_the_card_of_the_folder_is_shown(make_checkpoint):
    folder = make_checkpoint()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    shown = "left out:\n  nothing\n\nREADME.md:\n\n---\nlicense: mit\n---\n# Mine\n\n<!-- modules: begin -->\n"
    assert shown in push(folder, "me/tiny", "--dry-run")


def test_pushes_and_says_how_to_pin(make_checkpoint, hub):
    folder = make_checkpoint()
    out = push(folder, "me/tiny", "--commit-message", "mine", "--revision", "v1", "--token", OWNER, "--quiet")
    repository = hub.repositories["me/tiny"]
    sha = repository.branches["v1"]
    assert repository.history("v1")[0].message == "mine"
    assert repository.files("main") == {}
    assert f"pushed to me/tiny (private), branch v1, commit {sha}" in out
    assert f'AutoModelForCausalLM.from_pretrained("me/tiny", revision="{sha}", trust_remote_code=True)' in out
    assert "nothing has changed in me/tiny" in push(folder, "me/tiny", "--revision", "v1")
    out = push(folder, "me/tiny", "--public")
    assert "stays private" in out
    (folder / "generation_config.json").unlink()
    assert "had left there: generation_config.json\n" in push(folder, "me/tiny")
    assert "(public), branch main" in push(folder, "me/open", "--public")
    assert not hub.repositories["me/open"].private


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["me/open"], "exists and is public"),
        (["open"], "names no user"),
        (["me/tiny", "--token", STRANGER], "403 Forbidden"),
        (["me/tiny", "--revision", "0" * 40], "is a commit"),
        (["me/open", "--public"], "Error while uploading"),
    ],
)
def test_mistakes_end_with_one_line(make_checkpoint, hub, arguments, message):
    folder = make_checkpoint()
    push(folder, "me/open", "--public", "--quiet")
    hub.refuse, weights = ("PUT", "/lfs/"), load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, folder / "model.safetensors")
    lines = run_command("push", folder, *arguments, code=1).stderr.splitlines()
    assert message in lines[-1]
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert set(hub.repositories) == {"me/open"}


def test_a_folder_that_is_not_whole(make_checkpoint):
    folder = make_checkpoint()
    (folder / "compression.py").unlink()
    assert "lacks compression.py" in run_command("push", folder, "me/tiny", "--dry-run", code=1).stderr


def test_what_it_says_to_machines(make_checkpoint, hub):
    folder = make_checkpoint()
    package = prepare(folder, "me/tiny")
    sent = {"files": package.sizes, "bytes": sum(package.sizes.values()), "left_out": {}}
    dry = run_json("push", folder, "me/tiny", "--dry-run")
    assert dry == {"repo_id": "me/tiny", "dry_run": True, **sent, "card": package.card}
    assert hub.requests == []
    record = run_json("push", folder, "me/tiny")
    sha = hub.repositories["me/tiny"].branches["main"]
    done = {"repo_id": "me/tiny", "branch": "main", "sha": sha, "private": True, "deleted": [], "changed": True}
    assert record == {**done, "dry_run": False, **sent}


def test_a_hub_that_does_not_answer(make_checkpoint, monkeypatch, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    done = run_command("push", make_checkpoint(), "me/tiny", "--token", "hf_none", code=1)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the Hub cannot be reached (")
