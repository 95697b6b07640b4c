"""The core of plugin and proxy: an ASGI layer around a server that compresses the prompts on their way in.

On the way out, `usage.prompt_tokens_details.original_tokens` says how many tokens the `prompt_tokens` slots stand for,
and the completion that answers a chat is a chat completion again, streamed or not.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .chat_requests import chat_of_completion
from .request_compression import RequestCompressor, RewrittenRequest
from .request_fields import BadRequest
from .serving_metrics import ServingMetrics

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
# Compressing is mostly outside of Python's lock: two threads keep up with an engine, more only compete with it.
THREADS = 2


class CompressionMiddleware:
    """Compresses the POST requests of `app`; everything else passes.

    Args:
        app: the ASGI application that answers.
        compressor: what rewrites requests, in threads of its own.
        metrics: what is counted.
    """

    def __init__(self, app: Any, compressor: RequestCompressor, metrics: ServingMetrics):
        self.app, self.compressor, self.metrics = app, compressor, metrics
        self.threads = ThreadPoolExecutor(THREADS, thread_name_prefix="semtoken")

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        root = scope.get("root_path", "")
        path, content = scope["path"].removeprefix(root), await read_content(receive)
        if content is None:  # the client has left
            return
        try:
            loop = asyncio.get_running_loop()
            rewritten = await loop.run_in_executor(self.threads, self.compressor.rewrite, path, content)
        except BadRequest as error:
            self.metrics.refused.inc()
            return await send_error(send, 400, str(error))
        self.metrics.count(rewritten)
        if rewritten.original_tokens is not None:
            send = AnswerPatch(send, rewritten).send
        inner = {**scope, "path": root + rewritten.path, "raw_path": (root + rewritten.path).encode()}
        inner["headers"] = with_length(scope["headers"], len(rewritten.content))
        await self.app(inner, replaying(rewritten.content, receive), send)


async def read_content(receive: Receive) -> bytes | None:
    """The whole body of a request; None: the client has left."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def replaying(content: bytes, receive: Receive) -> Receive:
    """`receive` with this body first; behind it comes what really comes, such as that the client leaves."""
    left = [content]

    async def replay() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return replay


def with_length(headers: list[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    """Headers for a body of another length."""
    kept = [(name, value) for name, value in headers if name not in (b"content-length", b"transfer-encoding")]
    return [*kept, (b"content-length", str(length).encode())]


async def send_error(send: Send, status: int, message: str, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
    """An error as OpenAI's clients read it."""
    kind = "BadRequestError" if status == 400 else "ServiceUnavailableError"
    content = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": status}}).encode()
    start = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": content})


class AnswerPatch:
    """Patches the answer to a compressed request on its way to the client: JSON as a whole, streams event by event."""

    def __init__(self, send: Send, request: RewrittenRequest):
        self._send, self._request = send, request
        self._start: Message | None = None  # held back until the new length is known
        self._is_stream = False
        self._rest, self._opened = b"", set[int]()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = dict(message["headers"]).get(b"content-type", b"")
            self._is_stream = kind.startswith(b"text/event-stream")
            if message["status"] == 200 and not self._is_stream:
                self._start = message
                return
        elif message["type"] == "http.response.body" and (self._is_stream or self._start is not None):
            self._rest += message.get("body", b"")
            is_end = not message.get("more_body", False)
            message = {**message, "body": self._events(is_end) if self._is_stream else b""}
            if self._start is not None:
                if not is_end:
                    return
                message["body"] = self._patched(self._rest, is_chunk=False)
                headers = with_length(self._start["headers"], len(message["body"]))
                await self._send({**self._start, "headers": headers})
        await self._send(message)

    def _events(self, is_end: bool) -> bytes:
        """The events that are whole by now, patched."""
        events = self._rest.split(b"\n\n")
        self._rest = events.pop()
        if is_end and self._rest:
            events.append(self._rest)
            self._rest = b""
        return b"".join(self._event(event) + b"\n\n" for event in events)

    def _event(self, event: bytes) -> bytes:
        data = event.removeprefix(b"data:").strip()
        return event if data == event.strip() else b"data: " + self._patched(data, is_chunk=True)

    def _patched(self, content: bytes, is_chunk: bool) -> bytes:
        """An answer or a chunk with its usage, as what the client asked for; whatever else it is stays as it is."""
        try:
            answer = json.loads(content)
        except ValueError:  # [DONE]
            return content
        if not isinstance(answer, dict) or "choices" not in answer:
            return content
        if self._request.is_chat:
            answer = chat_of_completion(answer, is_chunk, self._opened)
        if (usage := answer.get("usage")) is not None:
            details = usage.get("prompt_tokens_details") or {}
            usage["prompt_tokens_details"] = {**details, "original_tokens": self._request.original_tokens}
        return json.dumps(answer, ensure_ascii=False).encode()


__all__ = ["CompressionMiddleware", "replaying", "read_content", "send_error", "with_length"]
