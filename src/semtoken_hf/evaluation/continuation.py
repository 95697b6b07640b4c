"""What follows a prompt that some method has read: scored, or decoded greedily.

Every method ends in a `Prefill`, so all of them are scored and decoded by the same few lines. This file imports only
PyTorch: the environment of the kvpress baselines, which cannot install this package, loads it too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Prefill:
    """A prompt of n tokens after it was read.

    Attributes:
        cache: its keys and values, in whatever cache the method uses.
        logits: float [V], of the token that follows the prompt.
        next_position: original position of that token, n unless the method renumbers.
        slots: positions that the cache holds (per layer and head).
        kept: bool [n], tokens with a slot of their own; None where a token has no such place (a pruned cache keeps
            other tokens in every layer and head).
    """

    cache: Any
    logits: Tensor
    next_position: int
    slots: int
    kept: Tensor | None = None


def extend(model: Any, prefill: Prefill, ids: Tensor, offset: int) -> Tensor:
    """Logits [q, V] of tokens int64 [q] that are appended `offset` tokens behind the prompt; they enter the cache."""
    positions = torch.arange(len(ids), device=ids.device)[None] + prefill.next_position + offset
    return model(input_ids=ids[None], position_ids=positions, past_key_values=prefill.cache).logits[0]


@torch.no_grad()
def score_target(model: Any, prefill: Prefill, target: Tensor) -> Tensor:
    """Negative log-likelihood float64 [t] (nats) of tokens int64 [t] behind the prompt; the cache stays as it was."""
    logits = prefill.logits[None]
    if len(target) > 1:
        # Layers with a sliding window forget what the crop has to bring back. kvpress's Transformers cannot be told.
        if hasattr(prefill.cache, "activate_past_recording"):
            prefill.cache.activate_past_recording()
        logits = torch.cat([logits, extend(model, prefill, target[:-1], 0)])
        prefill.cache.crop(1 - len(target))
    return torch.nn.functional.cross_entropy(logits.double(), target, reduction="none")


@torch.no_grad()
def decode_greedily(
    model: Any, prefill: Prefill, max_new_tokens: int, is_end: Callable[[list[int]], bool]
) -> list[int]:
    """Ids of the greedy continuation, up to `max_new_tokens` or until `is_end` of what there is; grows the cache."""
    ids: list[int] = []
    logits = prefill.logits
    for step in range(max_new_tokens):
        token = logits.argmax()
        ids.append(int(token))
        if is_end(ids) or step + 1 == max_new_tokens:
            break
        logits = extend(model, prefill, token[None], step)[-1]
    return ids


__all__ = ["Prefill", "decode_greedily", "extend", "score_target"]
