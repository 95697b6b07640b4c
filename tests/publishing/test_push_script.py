"""`scripts/push_to_hub.py`: what it prints, and mistakes that end with one line."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file, save_file

from tests.fixtures.scripts import main_of
from tests.hub.hub_server import OWNER, STRANGER


@pytest.fixture
def run_script(monkeypatch, capsys):
    """A function that runs the script and returns what it prints."""
    main = main_of("push_to_hub.py", monkeypatch)

    def run(*arguments) -> str:
        main(*arguments)
        return capsys.readouterr().out

    return run


def test_a_dry_run_shows_everything_and_asks_nothing(run_script, make_checkpoint, hub):
    folder = make_checkpoint()
    (folder / "training_args.bin").write_bytes(b"x")
    out = run_script(folder, "me/tiny", "--dry_run")
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


def test_the_card_of_the_folder_is_shown(run_script, make_checkpoint):
    folder = make_checkpoint()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    shown = "left out:\n  nothing\n\nREADME.md:\n\n---\nlicense: mit\n---\n# Mine\n\n<!-- modules: begin -->\n"
    assert shown in run_script(folder, "me/tiny", "--dry_run")


def test_pushes_and_says_how_to_pin(run_script, make_checkpoint, hub):
    folder = make_checkpoint()
    out = run_script(folder, "me/tiny", "--commit_message", "mine", "--revision", "v1", "--token", OWNER, "--quiet")
    repository = hub.repositories["me/tiny"]
    sha = repository.branches["v1"]
    assert repository.history("v1")[0].message == "mine"
    assert repository.files("main") == {}
    assert f"pushed to me/tiny (private), branch v1, commit {sha}" in out
    assert f'AutoModelForCausalLM.from_pretrained("me/tiny", revision="{sha}", trust_remote_code=True)' in out
    assert "nothing has changed in me/tiny" in run_script(folder, "me/tiny", "--revision", "v1")
    out = run_script(folder, "me/tiny", "--public")
    assert "stays private" in out
    (folder / "generation_config.json").unlink()
    assert "had left there: generation_config.json\n" in run_script(folder, "me/tiny")
    assert "(public), branch main" in run_script(folder, "me/open", "--public")
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
def test_mistakes_end_with_one_line(run_script, make_checkpoint, hub, capsys, arguments, message):
    folder = make_checkpoint()
    run_script(folder, "me/open", "--public", "--quiet")
    hub.refuse, weights = ("PUT", "/lfs/"), load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, folder / "model.safetensors")
    with pytest.raises(SystemExit) as stopped:
        run_script(folder, *arguments)
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("push_to_hub.py: error: ")
    assert set(hub.repositories) == {"me/open"}


def test_a_folder_that_is_not_whole(run_script, make_checkpoint, capsys):
    folder = make_checkpoint()
    (folder / "compression.py").unlink()
    with pytest.raises(SystemExit):
        run_script(folder, "me/tiny", "--dry_run")
    assert "lacks compression.py" in capsys.readouterr().err
