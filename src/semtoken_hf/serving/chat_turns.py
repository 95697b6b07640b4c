"""A chat turn by turn: what earlier requests sent stays bit for bit, and an engine's prefix cache has it already.

A client sends the whole chat each time. It is cut behind the user turns whose answers are in it; each piece is planned
for the question at its own end, as `generate` does behind a cache, and never again. A piece of fewer tokens than
`min_prompt_length` waits for the turns behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# Of a chat, int64 or bool [1, T] each.
Encoding = Mapping[str, Tensor]


def chat_pieces(
    encode: Callable[[list[dict[str, Any]]], Encoding], messages: list[dict[str, Any]], min_length: int
) -> list[Encoding]:
    """The encoding of a chat in pieces of at least `min_length` tokens but for the last, which a longer chat keeps.

    Args:
        encode: messages -> their encoding, with what opens the next answer where a user has spoken last.
        messages: of the chat.
        min_length: tokens below which nothing is compressed.
    """
    whole = encode(messages)
    ids, start, pieces = whole["input_ids"], 0, []
    for number, message in enumerate(messages[:-1], 1):
        if message["role"] != "user" or messages[number]["role"] != "assistant":
            continue
        part = encode(messages[:number])
        end = part["input_ids"].shape[1]
        # A template may show earlier turns otherwise than the latest one: then they were never sent like this.
        is_prefix = end < ids.shape[1] and torch.equal(part["input_ids"], ids[:, :end])
        if is_prefix and end - start >= min_length:
            pieces.append(_columns(part, start))
            start = end
    return [*pieces, _columns(whole, start)]


def _columns(encoding: Encoding, start: int) -> dict[str, Tensor]:
    return {name: values[:, start:] for name, values in encoding.items()}


__all__ = ["chat_pieces"]
