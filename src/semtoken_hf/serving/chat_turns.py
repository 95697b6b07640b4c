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

from ..cache_semtoken import SemTokenCache, append_plain
from .prompt_embeds import ENCODING_FIELDS, ExportedPrompt, check_config, prompt_embeds_of

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
    return {name: encoding[name][:, start:] for name in ENCODING_FIELDS if name in encoding}


def export_pieces(model: Any, pieces: list[Encoding], target_ratio: float | None = None) -> ExportedPrompt:
    """Compress the pieces of one chat, each behind the slots of those before it.

    Args:
        model: a SemToken model, with or without its head.
        pieces: from `chat_pieces`.
        target_ratio: tokens per slot, instead of the configuration's.

    Raises:
        ValueError: as in `export_prompt`.
    """
    check_config(model.config)
    cache, embeds, is_met = SemTokenCache(), [], True
    with torch.no_grad():
        for piece in pieces:
            ids = piece["input_ids"]
            if len(pieces) > 1 and ids.shape[1] < max(2, model.config.min_prompt_length):
                append_plain(cache, ids, None, None, "compact")
                embeds.append(model.get_input_embeddings()(ids)[0])
                continue
            # Of a prompt, every token is real.
            fields = {name: values for name, values in piece.items() if name != "attention_mask"}
            prompt = model.compress(**fields, target_ratio=target_ratio, position_mode="compact", past_key_values=cache)
            embeds.append(prompt_embeds_of(prompt, start=sum(map(len, embeds))))
            cache.record(prompt.slot_lengths, ids.shape[1], compressed=prompt.is_merged, padded=False)
            is_met &= bool(prompt.budget_met)
    return ExportedPrompt(torch.cat(embeds).cpu(), cache.get_seq_length(), is_met)


__all__ = ["chat_pieces", "export_pieces"]
