"""A chat as a completion: messages rendered by the checkpoint's template, and the answer as a chat completion again."""

from __future__ import annotations

import inspect
import time
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..logging_semtoken import get_logger
from .request_fields import BadRequest

logger = get_logger(__name__)

# Of a chat alone: a completion either has no such field or means something else by it.
CHAT_FIELDS = (
    "messages",
    "max_completion_tokens",
    "logprobs",
    "top_logprobs",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "reasoning_effort",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
    "documents",
)
# Of those, what the template is given.
TEMPLATE_FIELDS = ("add_generation_prompt", "continue_final_message", "documents", "reasoning_effort")
# Of those, what concerns the end of the chat alone.
OF_LAST_TURN = ("add_generation_prompt", "continue_final_message")
# What a client may not set by `chat_template_kwargs`: the arguments of rendering itself.
RENDERING = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"documents"}
RENDERING |= {"protect_template", "return_query_mask", "mark_question"}


def plain_chat_reason(body: dict[str, Any]) -> str | None:
    """What in a chat only the engine's own chat endpoint can do, or None.

    Raises:
        BadRequest: there are no messages, or one is none.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("`messages` must be a list with at least one message")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRequest(f"each of `messages` must be an object with a `role`, got {message!r:.100}")
        if message.get("tool_calls") or message["role"] in ("tool", "function"):
            return "tool calls"
        content = message.get("content")
        if isinstance(content, list) and not all(isinstance(part, (str, dict)) and _text_of(part) for part in content):
            return "parts that are no text"
    if body.get("tools") and body.get("tool_choice") != "none":
        return "`tools`"
    return next((f"`{name}`" for name in ("functions", "audio", "echo", "prompt_logprobs") if body.get(name)), None)


def _text_of(part: str | dict[str, Any]) -> str | None:
    """The text of a content part, or None."""
    return part if isinstance(part, str) else part.get("text") if part.get("type") == "text" else None


def encode_chat(tokenizer: Any, config: Any, body: dict[str, Any]) -> Any:
    """The encoding of a chat, with the question at the end of the last user turn marked if the model cannot find it.

    Raises:
        BadRequest: there is no template, it refuses the messages, or a client may not set a template argument.
    """
    messages = [_flattened(message) for message in body["messages"]]
    given = body.get("chat_template_kwargs") or {}
    if not isinstance(given, dict) or RENDERING & given.keys() or body.get("chat_template") is not None:
        raise BadRequest("the checkpoint's chat template applies: `chat_template` and its rendering cannot be set")
    arguments = {name: body[name] for name in TEMPLATE_FIELDS if body.get(name) is not None} | given
    arguments.setdefault("add_generation_prompt", not arguments.get("continue_final_message"))
    options = {**arguments, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    if tokenizer.chat_template is None:
        raise BadRequest("the checkpoint has no chat template: use /v1/completions")
    try:
        if (config.text_markers or {}).get("turn_opening"):
            return tokenizer.apply_chat_template(messages, **options)
        return _with_question(tokenizer, messages, options)
    except (TemplateError, TypeError, ValueError) as error:
        raise BadRequest(f"the chat template refuses these messages: {error}") from error


def _with_question(tokenizer: Any, messages: list[dict[str, Any]], options: dict[str, Any]) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, return_query_mask=True, **options)
    except ValueError as error:
        encoding = tokenizer.apply_chat_template(messages, **options)
        logger.warning_once(f"SemToken cannot tell the question of a chat from its template: {error}")
        return encoding


def _flattened(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its parts as one text, which every template takes."""
    content = message.get("content")
    if not isinstance(content, list):
        return {**message, "content": content if content is not None else ""}
    return {**message, "content": "\n".join(_text_of(part) or "" for part in content)}


def completion_of_chat(body: dict[str, Any]) -> dict[str, Any]:
    """The body of a completion that asks for what a chat asked for, without its prompt."""
    completion = {name: value for name, value in body.items() if name not in CHAT_FIELDS}
    # Null, for as much as the context has room for, as in a chat: unset, a completion ends after 16 tokens.
    asked = body.get("max_completion_tokens")
    completion["max_tokens"] = body.get("max_tokens") if asked is None else asked
    if body.get("logprobs"):
        completion["logprobs"] = body.get("top_logprobs") or 0
    return completion


def chat_of_completion(answer: dict[str, Any], is_chunk: bool, opened: set[int]) -> dict[str, Any]:
    """The chat completion, or the chunk of one, that says what a completion or its chunk says.

    Args:
        answer: of the engine; is not changed.
        is_chunk: it is one of a stream.
        opened: indices whose stream has begun; is added to.
    """
    choices = []
    for choice in answer.get("choices", []):
        text, index = choice.get("text") or "", choice.get("index", 0)
        message = {"content": text} if is_chunk and index in opened else {"role": "assistant", "content": text}
        opened.add(index)
        changed = {"delta" if is_chunk else "message": message, "logprobs": chat_logprobs(choice.get("logprobs"))}
        choices.append({name: value for name, value in choice.items() if name not in ("text", "logprobs")} | changed)
    return {
        **answer,
        "id": f"chat{answer.get('id', 'cmpl')}",
        "object": "chat.completion.chunk" if is_chunk else "chat.completion",
        "created": answer.get("created", int(time.time())),
        "choices": choices,
    }


def chat_logprobs(logprobs: dict[str, Any] | None) -> dict[str, Any] | None:
    """The log-probabilities of a completion as those of a chat."""
    if logprobs is None:
        return None
    tokens, values = logprobs.get("tokens") or [], logprobs.get("token_logprobs") or []
    alternatives = logprobs.get("top_logprobs") or [None] * len(tokens)
    content = []
    for token, value, others in zip(tokens, values, alternatives, strict=True):
        top = [_logprob(name, number) for name, number in (others or {}).items()]
        content.append({**_logprob(token, value), "top_logprobs": top})
    return {"content": content}


def _logprob(token: str, value: float | None) -> dict[str, Any]:
    # As vLLM writes what is impossible, since JSON has no infinity.
    return {"token": token, "logprob": -9999.0 if value is None else value, "bytes": list(token.encode())}


__all__ = ["chat_of_completion", "completion_of_chat", "encode_chat", "plain_chat_reason"]
