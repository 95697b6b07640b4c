"""What plugin and proxy count, for Prometheus."""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram

from .request_compression import RewrittenRequest


class ServingMetrics:
    """Counters of a registry: of this process, unless another is given."""

    def __init__(self, registry: CollectorRegistry = REGISTRY):
        self.registry = registry
        self.requests = Counter("semtoken_requests", "Requests by what became of them", ["prompt"], registry=registry)
        self.refused = Counter("semtoken_bad_requests", "Requests refused with 400", registry=registry)
        self.tokens = Counter("semtoken_original_tokens", "Prompt tokens before compression", registry=registry)
        self.slots = Counter("semtoken_slots", "Slots they became", registry=registry)
        self.seconds = Histogram("semtoken_compression_seconds", "Time to compress a request", registry=registry)

    def count(self, request: RewrittenRequest) -> None:
        """Count a request that goes to the engine."""
        tokens = request.original_tokens
        self.requests.labels("plain" if tokens is None else "compressed").inc()
        if tokens is not None:
            self.tokens.inc(tokens)
            self.slots.inc(request.slots)
            self.seconds.observe(request.seconds)


__all__ = ["ServingMetrics"]
