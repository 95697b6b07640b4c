"""`semtoken serve`: an OpenAI-compatible server that compresses prompts for the engines behind it.

clients -> at most so many at once -> compression -> the least busy engine
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from .middleware import CompressionMiddleware, Receive, Send, send_error
from .request_compression import RequestCompressor
from .serving_metrics import ServingMetrics
from .upstreams import Forwarder


class InFlightLimit:
    """Answers 503 with `Retry-After` while `most` POST requests are being answered by `app`."""

    def __init__(self, app: Any, most: int, registry: CollectorRegistry):
        self.app, self.most, self.count = app, most, 0
        self.refused = Counter("semtoken_queue_full", "Requests refused with 503", registry=registry)
        Gauge("semtoken_in_flight", "Requests being answered", registry=registry).set_function(lambda: self.count)

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        if self.count >= self.most:
            self.refused.inc()
            message = f"{self.most} requests are being answered: try again in a second"
            return await send_error(send, 503, message, ((b"retry-after", b"1"),))
        self.count += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.count -= 1


def build_proxy(
    compressor: RequestCompressor, urls: list[str], *, max_in_flight: int = 256, timeout: float = 600.0
) -> Starlette:
    """The ASGI application of `semtoken serve`.

    Args:
        compressor: of the checkpoint whose plain model the engines run.
        urls: of the engines.
        max_in_flight: requests that are answered at once; others get 503.
        timeout: seconds that an engine may stay silent.

    Raises:
        ValueError: an address is none.
    """
    registry = CollectorRegistry()
    forwarder = Forwarder(urls, timeout)
    compression = CompressionMiddleware(forwarder, compressor, ServingMetrics(registry))

    async def health(request: Request) -> Response:
        engines = await forwarder.health()
        return JSONResponse({"engines": engines}, status_code=200 if any(engines.values()) else 503)

    async def metrics(request: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await forwarder.client.aclose()
        compression.threads.shutdown()

    routes = [
        Route("/health", health),
        Route("/metrics", metrics),
        Mount("/", InFlightLimit(compression, max_in_flight, registry)),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


__all__ = ["InFlightLimit", "build_proxy"]
