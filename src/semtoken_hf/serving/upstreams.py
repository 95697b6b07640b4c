"""The engines behind the proxy: which of them gets a request, and what it answers."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from ..logging_semtoken import get_logger
from .middleware import Receive, Send, read_content, send_error, with_length

logger = get_logger(__name__)

# Seconds: until a connection must stand, and for which an engine that refused one is only asked when no other is left.
CONNECT, REST = 5.0, 5.0
# Below vLLM's 5 seconds, so that no request goes into a connection that it is closing.
KEEP_ALIVE = 2.0
# Of a connection rather than of what it carries, or written anew by the server that sends it on.
REQUEST_HEADERS = (b"host", b"connection", b"keep-alive", b"transfer-encoding", b"upgrade", b"te", b"accept-encoding")
ANSWER_HEADERS = (b"connection", b"keep-alive", b"transfer-encoding", b"date", b"server")


@dataclass
class Upstream:
    """An engine: its address, the requests that it is answering, and the time before which it gets no others."""

    url: str
    in_flight: int = 0
    rests_until: float = 0.0


class Forwarder:
    """An ASGI application that lets the least busy engine answer.

    An engine that cannot be reached is passed over; a request that has reached one is not sent again. What then goes
    wrong is 502, or 504 when the engine stays silent for too long, or, within a stream, its last event.

    Args:
        urls: of the engines, such as http://127.0.0.1:8000.
        timeout: seconds that an engine may stay silent.

    Raises:
        ValueError: an address is none.
    """

    def __init__(self, urls: list[str], timeout: float):
        for url in urls:
            if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
                raise ValueError(f"`--upstream` must be an address such as http://127.0.0.1:8000, got {url!r}")
        self.upstreams = [Upstream(url.rstrip("/").removesuffix("/v1")) for url in urls]
        limits = httpx.Limits(max_connections=None, keepalive_expiry=KEEP_ALIVE)
        waits = httpx.Timeout(timeout, connect=CONNECT, pool=None)
        self.client = httpx.AsyncClient(limits=limits, timeout=waits, trust_env=False)

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        content = await read_content(receive)
        if content is None:
            return
        answering = asyncio.ensure_future(self._answer(scope, content, send))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
        finally:  # an engine stops when its connection is closed
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)

    async def health(self) -> dict[str, bool]:
        """Whether each engine answers /health."""

        async def is_well(upstream: Upstream) -> bool:
            try:
                return (await self.client.get(f"{upstream.url}/health", timeout=CONNECT)).is_success
            except httpx.HTTPError:
                return False

        answers = await asyncio.gather(*map(is_well, self.upstreams))
        return {upstream.url: answer for upstream, answer in zip(self.upstreams, answers, strict=True)}

    async def _answer(self, scope: Any, content: bytes, send: Send) -> None:
        now = time.monotonic()
        for upstream in sorted(self.upstreams, key=lambda u: (u.rests_until > now, u.in_flight)):
            try:
                with _counted(upstream):
                    return await self._ask(upstream, scope, content, send)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                upstream.rests_until = time.monotonic() + REST
                logger.warning(f"{upstream.url} cannot be reached: {error}")
            except httpx.TimeoutException:
                return await send_error(send, 504, "the engine was silent for too long: see --timeout")
            except httpx.TransportError as error:
                return await send_error(send, 502, f"the engine ended the connection: {error}")
        await send_error(send, 502, "no engine can be reached: see /health")

    async def _ask(self, upstream: Upstream, scope: Any, content: bytes, send: Send) -> None:
        """Ask one engine.

        Raises:
            httpx.TransportError: nothing has been sent to the client yet.
        """
        query = scope.get("query_string", b"").decode("latin-1")
        url = f"{upstream.url}{scope['path']}" + (f"?{query}" if query else "")
        headers = [(name, value) for name, value in scope["headers"] if name not in REQUEST_HEADERS]
        headers.append((b"accept-encoding", b"identity"))
        request = self.client.build_request(scope["method"], url, headers=headers, content=content)
        response = await self.client.send(request, stream=True)
        try:
            kept = [(n.lower(), v) for n, v in response.headers.raw if n.lower() not in ANSWER_HEADERS]
            start = {"type": "http.response.start", "status": response.status_code, "headers": kept}
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                body = await response.aread()
                await send({**start, "headers": with_length(kept, len(body))})
                return await send({"type": "http.response.body", "body": body})
            await send(start)
            await _stream(response, send)
        finally:
            await response.aclose()


async def _stream(response: httpx.Response, send: Send) -> None:
    """Pass events on as they come; the status is out by now, so that an error becomes the last event."""
    end = b""
    try:
        async for chunk in response.aiter_raw():
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
    except httpx.TransportError as error:
        message = f"the engine ended the stream: {error or type(error).__name__}"
        end = (
            b"data: "
            + json.dumps({"error": {"message": message, "type": "BadGateway", "code": 502}}).encode()
            + b"\n\n"
        )
    await send({"type": "http.response.body", "body": end})


async def _left(receive: Receive) -> None:
    """Until the client leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass


@contextmanager
def _counted(upstream: Upstream) -> Iterator[None]:
    upstream.in_flight += 1
    try:
        yield
    finally:
        upstream.in_flight -= 1


__all__ = ["Forwarder", "Upstream"]
