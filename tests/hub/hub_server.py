"""A Hub on the loopback interface for the real `huggingface_hub` client: commits in memory, and their endpoints."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

OWNER, READER, STRANGER = "hf_owner", "hf_reader", "hf_stranger"
# Token -> user, and whether it may write.
TOKENS = {OWNER: ("me", True), READER: ("me", False), STRANGER: ("someone", True), None: (None, False)}
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
Answer = tuple[int, dict[str, str], bytes]


class HubError(Exception):
    """An answer other than success: the status, and the code that the client's exceptions are chosen by."""

    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.code = status, code


def is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".png"))


def etag(path: str, content: bytes) -> str:
    """As on the Hub: SHA-256 of large files, git's own hash of others."""
    if is_lfs(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


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
        self.add_commit("main", "initial commit", {})

    def resolve(self, revision: str) -> Commit:
        """A branch, a tag or a commit's full id."""
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise HubError(404, f"no revision {revision}", "RevisionNotFound")
        return self.commits[sha]

    def add_commit(self, branch: str, message: str, files: dict[str, bytes]) -> Commit:
        """`files` is the whole tree."""
        parent = self.branches.get(branch)
        tree = sorted((path, etag(path, content)) for path, content in files.items())
        sha = hashlib.sha1(repr((self.repo_id, parent, len(self.commits), message, tree)).encode()).hexdigest()
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
        return dict(self.resolve(revision).files)


class HubServer:
    """`with HubServer() as hub:`; `hub.url` is the endpoint.

    Attributes:
        repositories: by id.
        requests: (method, path, token) of every request.
        refuse: (method, pattern of the path): such requests fail with 400.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.refuse: tuple[str, str] | None = None
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.routes = [
            ("GET", f"/api/models/{REPO}(/revision/(?P<revision>[^/]+))?", self._info),
            ("GET", f"/api/models/{REPO}/tree/(?P<revision>[^/]+)(/(?P<under>.+))?", self._tree),
            ("GET", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", self._file),
            ("POST", "/api/repos/create", self._create),
            ("POST", "/api/validate-yaml", self._validate),
            ("POST", f"/api/models/{REPO}/branch/(?P<branch>[^/]+)", self._branch),
            ("POST", f"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", self._preupload),
            ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", self._lfs_batch),
            ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", self._lfs_put),
            ("POST", f"/api/models/{REPO}/commit/(?P<revision>[^/]+)", self._commit),
        ]

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def variables(self) -> dict[str, str]:
        """Those with which a child process talks to this Hub, as nobody."""
        switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1,localhost", **switches}

    def answer(self, method: str, target: str, token: str | None, body: bytes) -> Answer:
        """Find the endpoint and let it answer."""
        path = urlsplit(target).path
        self.requests.append((method, path, token))
        if self.refuse and method == self.refuse[0] and re.search(self.refuse[1], path):
            return _json({"error": "refused"}, 400)
        for known, pattern, function in self.routes:
            match = re.fullmatch(pattern, path)
            if match and (method == known or (method, known) == ("HEAD", "GET")):
                names = {name: value and unquote(value) for name, value in match.groupdict().items()}
                try:
                    with self.lock:
                        if "repo" in names:
                            names["repo"] = self._repository(names["repo"], token, method == "POST")
                        return function(token, body, **names)
                except HubError as error:
                    headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)}
                    return error.status, headers, json.dumps({"error": str(error)}).encode()
        return _json({"error": f"no endpoint {path}"}, 404)

    def _repository(self, repo: str, token: str | None, write: bool) -> Repository:
        """As on the Hub, a private repository looks like a missing one to everybody else."""
        user, may_write = TOKENS[token]
        found = self.repositories.get(repo)
        if found is None or (found.private and user != repo.split("/")[0]):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and (not may_write or user != repo.split("/")[0]):
            raise HubError(403, f"this token may not write to {repo}")
        return found

    def _info(self, token: str | None, body: bytes, repo: Repository, revision: str | None) -> Answer:
        commit = repo.resolve(revision or "main")
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        return _json({"id": repo.repo_id, "private": repo.private, "sha": commit.sha, "siblings": siblings})

    def _tree(self, token: str | None, body: bytes, repo: Repository, revision: str, under: str | None) -> Answer:
        files = repo.files(revision)
        found = [path for path in sorted(files) if under is None or path.startswith(f"{under}/")]
        if under is not None and not found:
            raise HubError(404, f"{under} does not exist", "EntryNotFound")
        return _json([{"type": "file", "path": p, "size": len(files[p]), "oid": etag(p, files[p])} for p in found])

    def _file(self, token: str | None, body: bytes, repo: Repository, revision: str, path: str) -> Answer:
        commit = repo.resolve(revision)
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            return 404, {**headers, "X-Error-Code": "EntryNotFound"}, b""
        return 200, {**headers, "ETag": f'"{etag(path, commit.files[path])}"'}, commit.files[path]

    def _create(self, token: str | None, body: bytes) -> Answer:
        asked, (user, may_write) = json.loads(body), TOKENS[token]
        owner = asked.get("organization") or user
        if not may_write or owner != user:
            raise HubError(403, f"this token may not write to {owner}")
        repo = f"{owner}/{asked['name']}"
        is_new = repo not in self.repositories
        if is_new:
            private = asked.get("private") or asked.get("visibility") == "private"
            self.repositories[repo] = Repository(repo, bool(private))
        return _json({"url": f"{self.url}/{repo}"}, 200 if is_new else 409)

    def _validate(self, token: str | None, body: bytes) -> Answer:
        header = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        empty = [{"message": "empty or missing yaml metadata in repo card"}]
        return _json({"errors": [], "warnings": [] if header and yaml.safe_load(header[1]) else empty})

    def _branch(self, token: str | None, body: bytes, repo: Repository, branch: str) -> Answer:
        is_new = branch not in repo.branches
        if is_new:
            repo.branches[branch] = repo.branches["main"]
        return _json({}, 200 if is_new else 409)

    def _preupload(self, token: str | None, body: bytes, repo: Repository, revision: str) -> Answer:
        known, answers = repo.files(revision), []
        for path in (file["path"] for file in json.loads(body)["files"]):
            answer = {"path": path, "uploadMode": "lfs" if is_lfs(path) else "regular", "shouldIgnore": False}
            answers.append({**answer, "oid": etag(path, known[path])} if path in known else answer)
        return _json({"files": answers})

    def _lfs_batch(self, token: str | None, body: bytes, repo: Repository) -> Answer:
        objects = []
        for wanted in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}"}}
            objects.append({**wanted, **({} if wanted["oid"] in self.objects else {"actions": upload})})
        return _json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, token: str | None, body: bytes, oid: str) -> Answer:
        self.objects[oid] = body
        return 200, {}, b""

    def _commit(self, token: str | None, body: bytes, repo: Repository, revision: str) -> Answer:
        header, *operations = (json.loads(line) for line in body.splitlines())
        parent = header["value"].get("parentCommit")
        if parent is not None and parent != repo.branches[revision]:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = repo.files(revision)
        for kind, value in ((operation["key"], operation["value"]) for operation in operations):
            if kind == "deletedFile":
                del files[value["path"]]
            else:
                is_large = kind == "lfsFile"
                files[value["path"]] = self.objects[value["oid"]] if is_large else base64.b64decode(value["content"])
        made = repo.add_commit(revision, header["value"]["summary"], files)
        return _json({"commitUrl": f"{self.url}/{repo.repo_id}/commit/{made.sha}", "commitOid": made.sha})


def _json(value: Any, status: int = 200) -> Answer:
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # headers and body in one packet: two of them wait for each other

        def handle_any(self) -> None:
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            status, headers, content = hub.answer(self.command, self.path, token, self._body())
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content

        def log_message(self, *_: Any) -> None:
            pass

    return Handler
