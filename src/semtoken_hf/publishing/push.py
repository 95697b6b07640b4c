"""One commit that takes a checkpoint to the Hub: a reader sees the whole of it or nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from .card import render_card
from .module_hashes import BEGIN, module_hashes, with_modules
from .selection import CARD, Selection, is_loaded, select_files


@dataclass(frozen=True)
class Package:
    """What a push will send: the selected files, and the card as it will read."""

    folder: Path
    repo_id: str
    selection: Selection
    card: str

    @property
    def has_own_card(self) -> bool:
        """Whether the folder brings its card; if not, one that the repository has stays."""
        return CARD in self.selection.files

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each path in the repository."""
        sizes = {path: file.stat().st_size for path, file in self.selection.files.items()}
        return dict(sorted({**sizes, CARD: len(self.card.encode())}.items()))


@dataclass(frozen=True)
class Publication:
    """Where a push went.

    Attributes:
        repo_id: with its namespace.
        branch: that now points to `sha`.
        sha: the commit.
        private: whether the repository is.
        deleted: files of an earlier checkpoint that would have been loaded with this one.
        changed: False where the branch held all of it already.
    """

    repo_id: str
    branch: str
    sha: str
    private: bool
    deleted: tuple[str, ...]
    changed: bool


def prepare(folder: Path, repo_id: str) -> Package:
    """Select the files and render the card; nothing is asked of the Hub.

    Raises:
        FileNotFoundError, ValueError: see `select_files` and `render_card`; or `repo_id` is not namespace/name.
    """
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"{repo_id!r} names no user or organisation: write it as user/{repo_id}")
    selection = select_files(folder)
    return Package(folder, repo_id, selection, render_card(folder, selection, repo_id))


def push(
    package: Package,
    public: bool = False,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
) -> Publication:
    """Send a package in one commit, creating the repository and the branch where they are missing.

    Args:
        package: of `prepare`.
        public: create a public repository, or accept an existing one.
        revision: a branch, a new one starts from main; None: main.
        token: None: the one of `hf auth login`.
        commit_message: None: "Upload SemToken checkpoint".

    Raises:
        PermissionError: the repository exists and is public, and `public` was not asked for.
        ValueError: `revision` is a commit.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses, or the branch has moved meanwhile.
        RuntimeError: a file could not be uploaded.
    """
    branch = revision or "main"
    if re.fullmatch(r"[0-9a-f]{40}", branch):
        raise ValueError(f"{branch} is a commit, which never changes: name a branch to push to")
    api, repo_id = HfApi(token=token), package.repo_id
    private = _open_repository(api, repo_id, public)
    if branch != "main":
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    head = api.model_info(repo_id, revision=branch)
    there = {file.rfilename for file in head.siblings or []}
    new: dict[str, Path | bytes] = {**package.selection.files, CARD: package.card.encode()}
    if CARD in there and not package.has_own_card:
        kept = _with_these_modules(api, package, head.sha)
        new = {path: content for path, content in new.items() if path != CARD} | kept
    deleted = sorted(path for path in there - new.keys() if is_loaded(path))
    # `upload_folder` may split a folder into several commits.
    commit = api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(path, content) for path, content in new.items()),
            *(CommitOperationDelete(path) for path in deleted),
        ],
        commit_message=commit_message or "Upload SemToken checkpoint",
        revision=branch,
        parent_commit=head.sha,
    )
    return Publication(repo_id, branch, commit.oid, private, tuple(deleted), commit.oid != head.sha)


def _with_these_modules(api: HfApi, package: Package, sha: str | None) -> dict[str, Path | bytes]:
    """The repository's own card, where it lists the modules of an earlier push; else nothing to change."""
    file = api.hf_hub_download(package.repo_id, CARD, revision=sha)
    text = Path(file).read_text(encoding="utf-8")
    if BEGIN not in text:
        return {}
    return {CARD: with_modules(text, module_hashes(package.selection.files.values())).encode()}


def _open_repository(api: HfApi, repo_id: str, public: bool) -> bool:
    """Find or create the repository; whether it is private."""
    try:
        private = bool(api.model_info(repo_id).private)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=not public)
        return not public
    if not private and not public:
        raise PermissionError(
            f"{repo_id} exists and is public: pass --public to push there all the same, or make it private in its "
            "settings first"
        )
    return private


__all__ = ["Package", "Publication", "prepare", "push"]
