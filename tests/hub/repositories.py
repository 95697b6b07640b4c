"""Repositories with real commits in memory: what the loopback Hub serves."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

# As the Hub's own .gitattributes; what is not listed is sent inside the commit.
LFS_SUFFIXES = (".safetensors", ".png")
ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)


class HubError(Exception):
    """An answer other than success: the status, and the code that the client's exceptions are chosen by."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path: str) -> bool:
    return path.endswith(LFS_SUFFIXES)


def etag(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if is_lfs(path) else git_hash(content)


@dataclass
class Commit:
    sha: str
    parent: str | None
    message: str
    files: dict[str, bytes]


@dataclass
class Repository:
    """Immutable commits, and branches and tags that point to them."""

    repo_id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.add_commit("main", "initial commit", {".gitattributes": ATTRIBUTES.encode()})

    @property
    def owner(self) -> str:
        return self.repo_id.split("/")[0]

    def resolve(self, revision: str) -> Commit:
        """A branch, a tag or a commit's full id.

        Raises:
            HubError: 404.
        """
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise HubError(404, f"no revision {revision}", "RevisionNotFound")
        return self.commits[sha]

    def add_commit(self, branch: str, message: str, files: dict[str, bytes]) -> Commit:
        """`files` is the whole tree."""
        parent = self.branches.get(branch)
        identity = repr(
            (self.repo_id, parent, len(self.commits), message, sorted((p, git_hash(c)) for p, c in files.items()))
        )
        sha = hashlib.sha1(identity.encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent, message, files)
        self.branches[branch] = sha
        return self.commits[sha]

    def history(self, revision: str = "main") -> list[Commit]:
        """Newest first."""
        commits = [self.resolve(revision)]
        while commits[-1].parent is not None:
            commits.append(self.commits[commits[-1].parent])
        return commits

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """What was pushed: all but the Hub's own .gitattributes."""
        return {path: content for path, content in self.resolve(revision).files.items() if path != ".gitattributes"}
