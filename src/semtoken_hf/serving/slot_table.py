"""Continuous batching over slots (`generate_batch`, `init_continuous_batching`, `transformers serve`).

The scheduler of Transformers knows lists of token ids and pages of a cache, and no slots. So a prompt is compressed
when it is added, and the scheduler gets one id for each slot: up to the last merged one an id beyond the vocabulary
that names the prompt, behind it the tokens' own. It then fills blocks, splits prompts into chunks, evicts, shares and
forks as always. A step (one forward over pieces of many requests) is told which of its columns are slots, and reads
their embeddings and positions instead of what the ids say.

Positions: the scheduler counts 0..m-1 and goes on from m. Rotary attention sees differences alone, so a slot whose
token is the p-th of n takes position p - (n - m), and nothing else changes. In compact mode that is its own number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from ..compression import CompressedPrompt

# Ids travel as int32.
LAST_ID = 2**31 - 1
# Frequencies of other kinds follow the largest position of a call.
STATIC_ROPE_TYPES = frozenset({"default", "linear", "llama3", "proportional", "yarn"})


@dataclass
class PagedPrompt:
    """What is known of a compressed prompt while requests for it live.

    Attributes:
        request_ids: the request and those that Transformers will fork from it.
        prompt_ids: the tokens that the caller gave.
        embeddings: [L, H] on the CPU: the slots up to the last merged one. They wait there for their prefill.
        positions: int64 [L] on the CPU: their rotary positions where the scheduler counts 0..m-1.
    """

    request_ids: list[str]
    prompt_ids: list[int]
    embeddings: Tensor
    positions: Tensor


@dataclass
class SlotStep:
    """What one forward over packed pieces of requests reads in place of its ids.

    Attributes:
        pieces: of each request with slots in this step their first column, embeddings [S, H] and positions int64 [S],
            on the CPU.
        adapted: first and last + 1 column of each piece on which an adapter acts.
    """

    pieces: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)
    adapted: list[tuple[int, int]] = field(default_factory=list)

    @property
    def is_plain(self) -> bool:
        """Whether the plain forward is all there is to do."""
        return not self.pieces and not self.adapted

    def read(
        self, embed_tokens: Callable[[Tensor], Tensor], input_ids: Tensor, position_ids: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | bool]:
        """Embeddings and positions of a step, and the columns on which an adapter acts.

        Args:
            embed_tokens: int [1, T] -> [1, T, H].
            input_ids: int [1, T], beyond the vocabulary where there are slots; they are set to 0.
            position_ids: int [1, T].

        Returns:
            [1, T, H], int [1, T], and bool [1, T] or False for none.
        """
        columns = [slice(first, first + len(positions)) for first, _, positions in self.pieces]
        # In place: logits processors look at them, too, where a batch is padded even at slots.
        for piece in columns:
            input_ids[:, piece] = 0
        embeddings, position_ids = embed_tokens(input_ids), position_ids.clone()
        for piece, (_, slots, positions) in zip(columns, self.pieces, strict=True):
            embeddings[0, piece] = slots.to(embeddings)
            position_ids[0, piece] = positions.to(position_ids)
        if not self.adapted:
            return embeddings, position_ids, False
        adapted = torch.zeros(input_ids.shape, dtype=torch.bool)
        for first, end in self.adapted:
            adapted[:, first:end] = True
        return embeddings, position_ids, adapted.to(input_ids.device)


class SlotTable:
    """The compressed prompts of one manager's requests; any thread may use it.

    An id is never used twice: the cache shares blocks between requests by a hash of their ids, also with requests that
    ended long ago.

    Args:
        first_id: size of the vocabulary.
        children: requests that Transformers forks from each one (`num_return_sequences` - 1).
    """

    def __init__(self, first_id: int, children: int):
        self.first_id, self.children = first_id, children
        self._ids, self._lock = count(first_id), RLock()
        self._prompts: dict[str, PagedPrompt] = {}
        self._ended: set[str] = set()

    def __len__(self) -> int:
        return len({id(prompt) for prompt in list(self._prompts.values())})

    def add(self, request_id: str, prompt_ids: list[int], prompt: CompressedPrompt) -> list[int]:
        """Hold a prompt until its requests end.

        Args:
            request_id: of the request.
            prompt_ids: the n tokens of the prompt.
            prompt: the same as one row of m slots.

        Returns:
            m ids for the scheduler.

        Raises:
            ValueError: a live request has this id.
            OverflowError: all 32-bit ids were used.
        """
        slots = prompt.slot_lengths.shape[1]
        replaced = int((prompt.slot_lengths[0] > 1).nonzero()[-1]) + 1
        # The last slot is a whole token, and the scheduler counts it as slots - 1.
        positions = prompt.position_ids[0, :replaced] - prompt.position_ids[0, -1] + slots - 1
        request_ids = [request_id, *(f"{request_id}__child#{i}" for i in range(self.children))]
        paged = PagedPrompt(
            request_ids,
            prompt_ids,
            prompt.inputs_embeds[0, :replaced].detach().to("cpu", copy=True),
            positions.to("cpu", copy=True),
        )
        with self._lock:
            if request_id in self._prompts and request_id not in self._ended:
                raise ValueError(f"a request with the id {request_id!r} is running: choose another `request_id`")
            name = next(self._ids)
            if name > LAST_ID:
                raise OverflowError("no ids are left to name compressed prompts: start a new manager")
            self._ended.discard(request_id)
            self._prompts.update(dict.fromkeys(request_ids, paged))
        return [name] * replaced + prompt_ids[len(prompt_ids) - (slots - replaced) :]

    def get(self, request_id: str) -> PagedPrompt | None:
        return self._prompts.get(request_id)

    def drop(self, request_id: str) -> None:
        """Forget a prompt."""
        with self._lock:
            self._ended.discard(request_id)
            paged = self._prompts.get(request_id)
            for name in paged.request_ids if paged is not None else ():
                self._prompts.pop(name, None)

    def end(self, request_id: str) -> None:
        """Note that a request ends, for the next `sweep`."""
        with self._lock:
            if (paged := self._prompts.get(request_id)) is not None:
                self._ended.add(paged.request_ids[0])

    def sweep(self, living: Callable[[], set[str]]) -> None:
        """Forget what `end` noted, unless one of the prompt's requests is still among the ids of `living()`."""
        if not self._ended:
            return
        alive = living()
        with self._lock:
            for name in list(self._ended):
                if alive.isdisjoint(self._prompts[name].request_ids):
                    self.drop(name)

    def restore(self, output: Any) -> Any:
        """A `GenerationOutput` with the prompt that the caller gave; notes the end of its request."""
        if (paged := self.get(output.request_id)) is not None:
            output.prompt_ids = list(paged.prompt_ids)
            if output.is_finished():
                self.end(output.request_id)
        return output

    def step_of(self, requests: list[Any], has_adapter: bool) -> SlotStep:
        """What the next forward reads in place of ids.

        Args:
            requests: `FutureRequestState` of every request in the batch, in the order of their columns.
            has_adapter: whether the columns of compressed requests matter beyond their slots.

        Raises:
            RuntimeError: ids beyond the vocabulary without a known prompt.
        """
        step, column = SlotStep(), 0
        for request in requests:
            state, length = request.state, request.query_length
            # Already moved on by this step.
            start = state.position_offset - length
            paged = self.get(state.request_id)
            if paged is not None:
                slots = slice(start, state.position_offset)
                if start < len(paged.positions):
                    step.pieces.append((column, paged.embeddings[slots], paged.positions[slots]))
                if has_adapter:
                    step.adapted.append((column, column + length))
            elif start < len(state.initial_tokens) and state.initial_tokens[start] >= self.first_id:
                raise RuntimeError(f"request {state.request_id!r} has ids beyond the vocabulary")
            column += length
        return step


def moving_rope_types(config: Any) -> set[str]:
    """Kinds of rotary embedding whose frequencies depend on the positions of a call."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    return {value.get("rope_type", "default") for value in nested} - STATIC_ROPE_TYPES


__all__ = ["PagedPrompt", "SlotStep", "SlotTable", "moving_rope_types"]
