"""Fields of a request for an OpenAI-compatible server: read, checked, and refused with a message for the client."""

from __future__ import annotations

import json
from typing import Any

from ..configuration_semtoken import check_ratio

# This package's own, which the engine never sees.
OWN_FIELDS = ("target_ratio", "compression")
# Of a completion; each needs the prompt's tokens.
TOKEN_FIELDS = ("suffix", "echo", "prompt_logprobs", "truncate_prompt_tokens", "use_beam_search")
EMBEDS = "prompt_embeds"


class BadRequest(ValueError):
    """A request that is answered with 400; the message says what to change."""


def read_body(content: bytes) -> dict[str, Any]:
    """The JSON object of a body.

    Raises:
        BadRequest: it is none.
    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadRequest(f"the body must be a JSON object, got {type(body).__name__}")
    return body


def refuse_embeds(content: bytes) -> None:
    """Raise BadRequest if a body is JSON with embeddings: the engine takes ours, and cannot trust those of clients."""
    try:
        left = [json.loads(content)]
    except (ValueError, RecursionError):
        return
    while left:
        value = left.pop()
        if isinstance(value, list):
            left += value
        elif isinstance(value, dict):
            if value.get(EMBEDS) is not None or value.get("type") == EMBEDS:
                raise BadRequest("`prompt_embeds` are not taken from clients: send text, token ids or messages")
            left += value.values()


def own_fields(body: dict[str, Any]) -> tuple[bool, float | None]:
    """`compression`, true unless it says false, and `target_ratio`, None if unset.

    Raises:
        BadRequest: one of them has a wrong value.
    """
    wants, ratio = body.get("compression"), body.get("target_ratio")
    if wants is not None and not isinstance(wants, bool):
        raise BadRequest(f"`compression` must be true or false, got {wants!r}")
    if ratio is not None:
        try:
            check_ratio(ratio)
        except ValueError as error:
            raise BadRequest(str(error)) from error
    return wants is not False, ratio


def token_field_of(body: dict[str, Any]) -> str | None:
    """The first field of a completion that needs the prompt's tokens, or None."""
    # `echo: false` asks for nothing, `prompt_logprobs: 0` for something.
    return next((name for name in TOKEN_FIELDS if body.get(name) not in (None, "") and body[name] is not False), None)


def read_prompts(prompt: Any, vocab_size: int) -> list[str | list[int]]:
    """The prompts of a completion: texts, and token ids below `vocab_size`.

    Raises:
        BadRequest: there is none, or one is neither.
    """
    is_row = isinstance(prompt, list) and any(isinstance(item, int) for item in prompt)
    prompts = prompt if isinstance(prompt, list) and not is_row else [prompt]
    if not prompts or prompts == [None]:
        raise BadRequest("`prompt` is missing: give a text, a list of texts, token ids, or a list of lists of them")
    for item in prompts:
        if isinstance(item, list):
            _check_ids(item, vocab_size)
        elif not isinstance(item, str):
            raise BadRequest(f"`prompt` must be text or token ids, or a list of either, got {item!r:.100}")
        if not item:
            raise BadRequest("`prompt` is empty")
    return prompts


def _check_ids(ids: list[Any], vocab_size: int) -> None:
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise BadRequest(f"`prompt` must hold token ids from 0 to {vocab_size - 1}, got {token!r:.100}")


__all__ = ["BadRequest", "OWN_FIELDS", "own_fields", "read_body", "read_prompts", "refuse_embeds", "token_field_of"]
