"""Variants to read a prompt and go on: plain Llama over n tokens and over m, and SemToken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface

from ..cache_semtoken import cache_bytes, is_semtoken_cache
from ..varlen_semtoken import VARLEN
from .clock import TokenStamps, peak_extra_bytes, seconds_of
from .workloads import Batch

# Attention that does no work on padding; it takes part where the package registers it.
RAGGED = VARLEN
PLAIN_N, PLAIN_M, PADDED = "plain_n", "plain_m", "semtoken"
TITLES = {
    PLAIN_N: "plain, n tokens",
    PLAIN_M: "plain, m tokens",
    PADDED: "SemToken",
    RAGGED: "SemToken, ragged",
}


@dataclass
class Variant:
    """One way to read a batch.

    Attributes:
        name: key of `TITLES`.
        model: a causal language model.
        batch: what it is given.
        attn_implementation: its attention backend.
        call: further arguments of `generate`.
    """

    name: str
    model: Any
    batch: Batch
    attn_implementation: str
    call: dict[str, Any] = field(default_factory=dict)

    def generate(self, new_tokens: int, **options: Any) -> Any:
        """Greedy text of exactly `new_tokens` tokens."""
        if self.model.config._attn_implementation != self.attn_implementation:
            self.model.set_attn_implementation(self.attn_implementation)
        return self.model.generate(
            input_ids=self.batch.input_ids,
            attention_mask=self.batch.attention_mask,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            **self.call,
            **options,
        )

    def inspect(self) -> dict[str, Any]:
        """Slots of each row, bytes of the keys and values, and peak bytes of a prefill."""

        def read() -> Any:
            return self.generate(1, return_dict_in_generate=True).past_key_values

        peak, cache = peak_extra_bytes(read, self.model.device)
        slots = cache.compressed_lengths.tolist() if is_semtoken_cache(cache) else self.batch.lengths
        return {"slots": slots, "kv_bytes": kv_bytes(cache), "peak_bytes": peak}

    def measure(self, new_tokens: int) -> dict[str, float]:
        """Seconds of one `generate`, to its first token, and of each further one."""
        stamps: list[TokenStamps] = []

        def run() -> None:
            stamps.append(TokenStamps())
            self.generate(new_tokens, streamer=stamps[0])

        whole = seconds_of(run)
        return {"prefill": stamps[0].to_first_token, "decode": stamps[0].per_token, "generate": whole}


def kv_bytes(cache: Any) -> int:
    """Bytes of the keys and values, in whatever form a cache holds them."""
    own: Callable[[], int] | None = getattr(cache, "memory_bytes", None)
    return cache_bytes(cache) if own is None else own()


def list_variants(
    model: Any, plain: Any, batch: Batch, ratio: float, attn_implementation: str, chunk_size: int | None = None
) -> list[Variant]:
    """Every way to read a batch at a ratio; for plain Llama over m tokens, each row is cut to its slots."""
    asked = {"target_ratio": ratio, "query_mask": batch.query_mask}
    with torch.no_grad():
        counts = model.compress(batch.input_ids, batch.attention_mask, **asked).kept_lengths.tolist()
    always = {} if chunk_size is None else {"prefill_chunk_size": chunk_size}
    ours = {**asked, **always}
    variants = [
        Variant(PLAIN_N, plain, batch, attn_implementation, always),
        Variant(PLAIN_M, plain, batch.first_tokens(counts), attn_implementation, always),
        Variant(PADDED, model, batch, attn_implementation, ours),
    ]
    if len(batch.lengths) > 1 and has_ragged_attention():
        variants.append(Variant(RAGGED, model, batch, RAGGED, ours))
    return variants


def has_ragged_attention() -> bool:
    return RAGGED in AttentionInterface()


__all__ = [
    "PADDED",
    "PLAIN_M",
    "PLAIN_N",
    "RAGGED",
    "TITLES",
    "Variant",
    "has_ragged_attention",
    "kv_bytes",
    "list_variants",
]
