"""A Hub on the loopback interface, for the real `huggingface_hub` client."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.hub.endpoints import OWNER, READER, ROUTES, STRANGER, Answer, Call, as_json
from tests.hub.repositories import HubError, Repository


class HubServer:
    """`with HubServer() as hub:`; `hub.url` is the endpoint, `hub.storage_url` where large files lie.

    Attributes:
        repositories: by id.
        requests: (method, path, token) of every request.
        unknown: requests that no endpoint is written for: a test that leaves any proves nothing.
        refuse: (method, pattern of the path): such requests fail with 400.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.unknown: list[str] = []
        self.refuse: tuple[str, str] | None = None
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        port = self._server.server_address[1]
        # The client treats another host as storage, which must not see the token.
        self.url, self.storage_url = f"http://127.0.0.1:{port}", f"http://localhost:{port}"

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
            return as_json({"error": "refused"}, 400)
        for known, pattern, function in ROUTES:
            match = pattern.fullmatch(path)
            if match and (method == known or (method, known) == ("HEAD", "GET")):
                call = Call(self, token, body)
                try:
                    with self.lock:
                        return function(call, **{n: v and unquote(v) for n, v in match.groupdict().items()})
                except HubError as error:
                    code = {"X-Error-Code": error.code} if error.code else {}
                    headers = {**code, "X-Error-Message": str(error), **call.headers}
                    return error.status, headers, json.dumps({"error": str(error)}).encode()
        self.unknown.append(f"{method} {target}")
        return as_json({"error": "no such endpoint"}, 404)


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # headers and body in one packet: two of them wait for each other

        def handle_any(self) -> None:
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            body = self._body()
            status, headers, content = hub.answer(self.command, self.path, token, body)
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


__all__ = ["OWNER", "READER", "STRANGER", "HubServer"]
