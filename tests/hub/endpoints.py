"""The endpoints that `huggingface_hub` calls to push, look up and download models; Xet is not among them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

import yaml

from tests.hub.repositories import HubError, Repository, etag, git_hash, is_lfs

OWNER, READER, STRANGER = "hf_owner", "hf_reader", "hf_stranger"
# Token -> user, and whether it may write.
TOKENS = {OWNER: ("me", True), READER: ("me", False), STRANGER: ("someone", True)}
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
Answer = tuple[int, dict[str, str], bytes]
ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Answer]]] = []


def route(method: str, pattern: str) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    def register(function: Callable[..., Answer]) -> Callable[..., Answer]:
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


def as_json(value: Any, status: int = 200) -> Answer:
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()


class Call:
    """One request: who asks, what for, and what may be seen and written."""

    def __init__(self, hub: Any, token: str | None, body: bytes):
        self.hub, self.token, self.body = hub, token, body
        self.headers: dict[str, str] = {}  # sent with an error, too

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    @property
    def user(self) -> str | None:
        """None without a token.

        Raises:
            HubError: 401 for a token that nobody has.
        """
        if self.token is not None and self.token not in TOKENS:
            raise HubError(401, "Invalid credentials in Authorization header")
        return TOKENS[self.token][0] if self.token else None

    def may_write(self, owner: str) -> None:
        if self.user is None:
            raise HubError(401, "log in")
        if not TOKENS[str(self.token)][1] or self.user != owner:
            raise HubError(403, f"this token may not write to {owner}")

    def repository(self, repo: str, write: bool = False) -> Repository:
        """As on the Hub, a private repository looks like a missing one to everybody else."""
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and self.user != found.owner):
            raise HubError(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write:
            self.may_write(found.owner)
        return found


@route("GET", "/api/whoami-v2")
def whoami(call: Call) -> Answer:
    if call.user is None:
        raise HubError(401, "log in")
    return as_json({"type": "user", "name": call.user, "orgs": []})


@route("GET", "/api/agent-harnesses")
def agent_harnesses(call: Call) -> Answer:
    # The client asks once a process and does without; an answer it would keep in the user's own cache.
    raise HubError(404, "no such list")


@route("POST", "/api/validate-yaml")
def validate_yaml(call: Call) -> Answer:
    header = re.match(r"---\n(.*?)\n---\n", call.json["content"], re.DOTALL)
    try:
        data = yaml.safe_load(header[1]) if header else None
    except yaml.YAMLError as error:
        return as_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
    empty = [{"message": "empty or missing yaml metadata in repo card"}]
    return as_json({"errors": [], "warnings": [] if data else empty})


@route("POST", "/api/repos/create")
def create_repo(call: Call) -> Answer:
    owner = call.json.get("organization") or call.user or ""
    call.may_write(owner)
    repo, private = f"{owner}/{call.json['name']}", call.json.get("private") or call.json.get("visibility") == "private"
    url = {"url": f"{call.hub.url}/{repo}"}
    if repo in call.hub.repositories:
        return as_json({"error": "You already created this model repo", **url}, 409)
    call.hub.repositories[repo] = Repository(repo, bool(private))
    return as_json(url)


@route("GET", f"/api/models/{REPO}(/revision/(?P<revision>[^/]+))?")
def repo_info(call: Call, repo: str, revision: str | None) -> Answer:
    repository = call.repository(repo)
    commit = repository.resolve(revision or "main")
    facts = {"id": repo, "modelId": repo, "private": repository.private, "sha": commit.sha, "tags": []}
    return as_json({**facts, "siblings": [{"rfilename": path} for path in sorted(commit.files)]})


@route("GET", f"/api/models/{REPO}/tree/(?P<revision>[^/]+)(/(?P<under>.+))?")
def tree(call: Call, repo: str, revision: str, under: str | None) -> Answer:
    commit = call.repository(repo).resolve(revision)
    found = {p: c for p, c in commit.files.items() if under is None or p.startswith(f"{under}/")}
    if under is not None and not found:
        raise HubError(404, f"{under} does not exist", "EntryNotFound")
    return as_json([_entry(path, content) for path, content in sorted(found.items())])


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
    return (
        {**entry, "lfs": {"oid": etag(path, content), "size": len(content), "pointerSize": 130}}
        if is_lfs(path)
        else entry
    )


@route("GET", f"/api/models/{REPO}/refs")
def refs(call: Call, repo: str) -> Answer:
    repository = call.repository(repo)

    def rows(kind: str, targets: dict[str, str]) -> list[dict[str, str]]:
        return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": sha} for n, sha in targets.items()]

    return as_json(
        {"branches": rows("heads", repository.branches), "tags": rows("tags", repository.tags), "converts": []}
    )


@route("POST", f"/api/models/{REPO}/branch/(?P<branch>[^/]+)")
def create_branch(call: Call, repo: str, branch: str) -> Answer:
    repository = call.repository(repo, write=True)
    if branch in repository.branches:
        raise HubError(409, f"{branch} exists")
    repository.branches[branch] = repository.resolve(call.json.get("startingPoint") or "main").sha
    return as_json({})


@route("POST", f"/api/models/{REPO}/tag/(?P<revision>[^/]+)")
def create_tag(call: Call, repo: str, revision: str) -> Answer:
    repository = call.repository(repo, write=True)
    repository.tags[call.json["tag"]] = repository.resolve(revision).sha
    return as_json({})


@route("POST", f"/api/models/{REPO}/preupload/(?P<revision>[^/]+)")
def preupload(call: Call, repo: str, revision: str) -> Answer:
    known = call.repository(repo, write=True).resolve(revision).files
    answers = []
    for file in call.json["files"]:
        path = file["path"]
        answer = {"path": path, "uploadMode": "lfs" if is_lfs(path) else "regular", "shouldIgnore": False}
        answers.append({**answer, "oid": etag(path, known[path])} if path in known else answer)
    return as_json({"files": answers})


@route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
def lfs_batch(call: Call, repo: str) -> Answer:
    call.repository(repo, write=True)
    objects = []
    for wanted in call.json["objects"]:
        entry = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in call.hub.objects:
            upload = {"href": f"{call.hub.storage_url}/lfs/{wanted['oid']}"}
            entry["actions"] = {"upload": upload, "verify": {"href": f"{call.hub.url}/lfs-verify/{repo}"}}
        objects.append(entry)
    return as_json({"transfer": "basic", "objects": objects})


@route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
def lfs_put(call: Call, oid: str) -> Answer:
    if hashlib.sha256(call.body).hexdigest() != oid:
        raise HubError(400, "the bytes are not those of the id")
    call.hub.objects[oid] = call.body
    return 200, {}, b""


@route("POST", f"/lfs-verify/{REPO}")
def lfs_verify(call: Call, repo: str) -> Answer:
    call.repository(repo, write=True)
    stored = call.hub.objects.get(call.json["oid"])
    if stored is None or len(stored) != call.json["size"]:
        raise HubError(400, "nothing such was uploaded")
    return as_json({})


@route("POST", f"/api/models/{REPO}/commit/(?P<revision>[^/]+)")
def commit(call: Call, repo: str, revision: str) -> Answer:
    repository = call.repository(repo, write=True)
    if revision not in repository.branches:
        raise HubError(404, f"no branch {revision}", "RevisionNotFound")
    header, *operations = (json.loads(line) for line in call.body.splitlines())
    parent = header["value"].get("parentCommit")
    if parent is not None and parent != repository.branches[revision]:
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    files = dict(repository.resolve(revision).files)
    for operation in operations:
        _apply(call.hub.objects, files, operation["key"], operation["value"])
    made = repository.add_commit(revision, header["value"]["summary"], files)
    return as_json({"commitUrl": f"{call.hub.url}/{repo}/commit/{made.sha}", "commitOid": made.sha})


def _apply(objects: dict[str, bytes], files: dict[str, bytes], kind: str, value: dict[str, Any]) -> None:
    path = value["path"]
    if kind == "file" and not is_lfs(path):
        files[path] = base64.b64decode(value["content"])
    elif kind == "lfsFile" and value["oid"] in objects:
        files[path] = objects[value["oid"]]
    elif kind == "deletedFile" and path in files:
        del files[path]
    else:
        raise HubError(400, f"cannot commit {kind} {path}")


@route("GET", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(call: Call, repo: str, revision: str, path: str) -> Answer:
    found = call.repository(repo).resolve(revision)
    call.headers["X-Repo-Commit"] = found.sha
    if path not in found.files:
        raise HubError(404, f"{path} does not exist", "EntryNotFound")
    content = found.files[path]
    tag = f'"{etag(path, content)}"'
    if not is_lfs(path):
        return 200, {**call.headers, "ETag": tag}, content
    linked = {"X-Linked-Etag": tag, "X-Linked-Size": str(len(content)), "ETag": f'"{git_hash(content)}"'}
    return 302, {**call.headers, **linked, "Location": f"{call.hub.storage_url}/cdn/{etag(path, content)}"}, b""


@route("GET", "/cdn/(?P<oid>[0-9a-f]{64})")
def cdn(call: Call, oid: str) -> Answer:
    return 200, {"ETag": f'"{oid}"'}, call.hub.objects[oid]
