"""Methods that read some of the tokens with the plain model, in the positions that the checkpoint's slots have."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..continuation import Prefill
from ..prompts import Prompt
from .base import Method


@dataclass
class Selection(Method):
    """Reads the tokens that `choose` marks and nothing else.

    The opening, the first `num_sink_tokens` tokens of the configuration, the question and the last `recent_window`
    tokens are always read: what SemToken protects, so that the methods differ in nothing else.
    """

    def choose(self, model: Any, prompt: Prompt, free: Tensor, count: int) -> Tensor:
        """Indices int64 [<= count] among `free` int64 [f], the tokens that nothing protects."""
        raise NotImplementedError

    @torch.no_grad()
    def read(self, model: Any, prompt: Prompt, slots: int) -> Prefill:
        kept = protected_tokens(model.config, prompt)
        free = (~kept).nonzero().squeeze(1)
        count = min(max(slots - int(kept.sum()), 0), len(free))
        kept[self.choose(model, prompt, free, count)] = True
        chosen = kept.nonzero().T
        length, is_compact = chosen.shape[1], model.config.position_mode == "compact"
        cache = DynamicCache(config=model.config)
        outputs = model(
            input_ids=prompt.ids[chosen[0]][None],
            position_ids=torch.arange(length, device=chosen.device)[None] if is_compact else chosen,
            # Explicit: without a mask, gapped positions would be read as packed sequences.
            attention_mask=torch.ones_like(chosen),
            past_key_values=cache,
            logits_to_keep=1,
            compression=False,
        )
        return Prefill(cache, outputs.logits[0, -1], length if is_compact else prompt.length, length, kept)


class FullContext(Selection):
    def choose(self, model: Any, prompt: Prompt, free: Tensor, count: int) -> Tensor:
        return free


class NoContext(Selection):
    def choose(self, model: Any, prompt: Prompt, free: Tensor, count: int) -> Tensor:
        return free[:0]


class Truncation(Selection):
    """The first tokens (the protected ones) and the last of the context."""

    def choose(self, model: Any, prompt: Prompt, free: Tensor, count: int) -> Tensor:
        return free[len(free) - count :]


class RandomDropping(Selection):
    """A uniform sample, the same for the same prompt."""

    def choose(self, model: Any, prompt: Prompt, free: Tensor, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(prompt.id.encode()))
        return free[torch.randperm(len(free), generator=generator)[:count].to(free.device)]


class SelfInformation(Selection):
    """The tokens that the model itself finds most surprising, -log p(x_t | x_<t): Selective Context (2310.06201).

    Theirs drops whole phrases, this drops tokens. It costs a full pass of the plain model before the short one.
    """

    def choose(self, model: Any, prompt: Prompt, free: Tensor, count: int) -> Tensor:
        logits = model(input_ids=prompt.ids[None], use_cache=False, compression=False).logits[0, :-1]
        surprise = torch.full((prompt.length,), torch.inf, device=free.device)
        surprise[1:] = torch.nn.functional.cross_entropy(logits.float(), prompt.ids[1:], reduction="none")
        return free[surprise[free].topk(count).indices]


def protected_tokens(config: Any, prompt: Prompt) -> Tensor:
    """bool [n]: the ends that a SemToken configuration protects, the opening and the question."""
    place = prompt.place
    return (
        prompt.opening
        | prompt.question
        | (place < config.num_sink_tokens)
        | (place >= prompt.length - max(config.recent_window, 1))
    )


__all__ = ["FullContext", "NoContext", "RandomDropping", "Selection", "SelfInformation", "Truncation"]
