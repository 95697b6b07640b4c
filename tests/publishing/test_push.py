"""One commit on a loopback Hub, through the real client."""

from __future__ import annotations

import hashlib

import pytest
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from semtoken_hf.publishing.push import prepare, push
from tests.hub.hub_server import STRANGER

REPO = "me/tiny"


def commits(hub, branch="main", repo=REPO):
    return [commit.message for commit in hub.repositories[repo].history(branch)]


def contents(package):
    files = {path: file.read_bytes() for path, file in package.selection.files.items()}
    return {**files, "README.md": package.card.encode()}


@pytest.mark.parametrize("kind", ["single", "sharded", "adapted"])
def test_one_private_commit_of_the_same_bytes(make_checkpoint, hub, kind, tmp_path):
    package = prepare(make_checkpoint(kind), REPO)
    done = push(package, commit_message="first")
    repository = hub.repositories[REPO]
    assert repository.private
    assert repository.files() == contents(package)
    assert package.sizes == {path: len(content) for path, content in repository.files().items()}
    assert commits(hub) == ["first", "initial commit"]
    assert (done.repo_id, done.branch, done.private, done.deleted, done.changed) == (REPO, "main", True, (), True)
    assert done.sha == repository.branches["main"]
    local = snapshot_download(REPO, revision=done.sha, cache_dir=tmp_path / "other-cache")
    for path, content in contents(package).items():
        assert (tmp_path / local / path).read_bytes() == content


def test_pushing_again_changes_nothing(make_checkpoint, hub):
    package = prepare(make_checkpoint(), REPO)
    first, second = push(package), push(package)
    assert second.sha == first.sha
    assert not second.changed
    assert len(commits(hub)) == 2


def test_what_an_earlier_checkpoint_left_is_not_loaded_with_this_one(make_checkpoint, hub):
    """A stale model.safetensors would win over new shards; pages and other formats stay."""
    push(prepare(make_checkpoint("adapted", "first"), REPO))
    others = {"gguf/model.gguf": b"other", "notes.md": b"mine", "old_module.py": b"x", "pytorch_model.bin": b"y"}
    for path, content in others.items():
        HfApi().upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=REPO)
    before = hub.repositories[REPO].branches["main"]
    package = prepare(make_checkpoint("sharded", "second"), REPO)
    done = push(package)
    stale = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors", "model.safetensors", "old_module.py"}
    assert set(done.deleted) == stale
    kept = {path: content for path, content in others.items() if path != "old_module.py"}
    kept["README.md"] = hub.repositories[REPO].files(before)["README.md"]
    assert hub.repositories[REPO].files() == {**contents(package), **kept}
    assert "model.safetensors" in hub.repositories[REPO].files(before)


def test_a_card_of_the_repository_lists_the_modules_that_are_there_now(make_checkpoint, hub):
    """The rest of it, written by hand, stays."""
    folder = make_checkpoint()
    push(prepare(folder, REPO))
    first = hub.repositories[REPO].files()["README.md"]
    HfApi().upload_file(path_or_fileobj=first + b"by hand\n", path_in_repo="README.md", repo_id=REPO)
    module = folder / "compression.py"
    module.write_text(module.read_text() + "# changed\n")
    push(prepare(folder, REPO))
    card = hub.repositories[REPO].files()["README.md"].decode()
    digest = hashlib.sha256(module.read_bytes()).hexdigest()
    assert f"{digest}  compression.py" in card
    assert "Not those of semtoken-hf" in card
    assert card.endswith("by hand\n")
    assert not push(prepare(folder, REPO)).changed


def test_a_branch_leaves_main_alone(make_checkpoint, hub):
    folder = make_checkpoint()
    on_main = push(prepare(folder, REPO))
    (folder / "LICENSE").write_text("free")
    done = push(prepare(folder, REPO), revision="feature/adapted")
    repository = hub.repositories[REPO]
    assert repository.branches == {"main": on_main.sha, "feature/adapted": done.sha}
    assert repository.files("feature/adapted") == {**repository.files(), "LICENSE": b"free"}
    again = push(prepare(folder, REPO), revision="feature/adapted")
    assert (again.sha, again.changed) == (done.sha, False)
    with pytest.raises(ValueError, match="is a commit, which never changes"):
        push(prepare(folder, REPO), revision=done.sha)


def test_visibility(make_checkpoint, hub):
    package = prepare(make_checkpoint(), REPO)
    assert not push(package, public=True).private
    assert not hub.repositories[REPO].private
    before, requests = hub.repositories[REPO].branches["main"], len(hub.requests)
    with pytest.raises(PermissionError, match=r"me/tiny exists and is public: pass --public"):
        push(package)
    assert hub.repositories[REPO].branches["main"] == before
    assert {method for method, *_ in hub.requests[requests:]} == {"GET"}
    assert not push(package, public=True).private
    hub.repositories[REPO].private = True
    assert push(package, public=True).private
    assert hub.repositories[REPO].private


@pytest.mark.parametrize(("repo_id", "message"), [("tiny", "names no user"), ("a/b/c", "Repo id")])
def test_bad_ids(make_checkpoint, repo_id, message):
    with pytest.raises(ValueError, match=message):
        prepare(make_checkpoint(), repo_id)


def test_who_may_not_write_leaves_nothing(make_checkpoint, hub):
    with pytest.raises(HfHubHTTPError) as refused:
        push(prepare(make_checkpoint(), REPO), token=STRANGER)
    assert refused.value.response.status_code == 403
    assert hub.repositories == {}


@pytest.mark.parametrize("step", [("PUT", "/lfs/"), ("POST", "/commit/")])
def test_nothing_half_pushed_is_ever_seen(make_checkpoint, hub, step):
    first = push(prepare(make_checkpoint("single", "first"), REPO))
    hub.refuse = step
    package = prepare(make_checkpoint("sharded", "second"), REPO)
    with pytest.raises((HfHubHTTPError, RuntimeError)):
        push(package)
    assert hub.repositories[REPO].branches["main"] == first.sha
    hub.refuse = None
    push(package)
    assert hub.repositories[REPO].files() == contents(package)


def test_a_commit_in_between_is_not_overwritten(make_checkpoint, hub, monkeypatch):
    folder = make_checkpoint()
    push(prepare(folder, REPO))
    (folder / "LICENSE").write_text("free")
    look, package = HfApi.model_info, prepare(folder, REPO)

    def look_then_lose(self, *args, **kwargs):
        info = look(self, *args, **kwargs)
        if kwargs.get("revision"):
            hub.repositories[REPO].add_commit("main", "theirs", {"theirs": b""})
        return info

    monkeypatch.setattr(HfApi, "model_info", look_then_lose)
    with pytest.raises(HfHubHTTPError, match="412"):
        push(package)
    assert commits(hub)[0] == "theirs"
