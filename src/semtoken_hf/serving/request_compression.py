"""A request for an inference engine, rewritten so that its prompts arrive compressed.

    text, lists of texts, token ids -> `prompt_embeds` of /v1/completions
    messages                        -> the same, by the checkpoint's chat template; see `chat_requests.py`

What the engine cannot do over embeddings (tools, `suffix`, `echo`, ...) reaches it as it is, with one warning for each
reason; so does, without one, a prompt that the model would not compress. `target_ratio` and `compression` in the body
hold for that request.
"""

from __future__ import annotations

import copy
import json
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from ..conversion.encoder import quiet_loading
from ..logging_semtoken import get_logger
from .chat_requests import OF_LAST_TURN, completion_of_chat, encode_chat, plain_chat_reason
from .chat_turns import chat_pieces
from .prompt_embeds import check_config, export_pieces, export_prompt
from .request_fields import OWN_FIELDS, BadRequest, own_fields, read_body, read_prompts, refuse_embeds, token_field_of

logger = get_logger(__name__)

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
# Other endpoints that read prompts; they stay plain.
PLAIN = ("/v1/responses", "/v1/messages", "/v1/chat/completions/batch", "/invocations", "/inference/v1/generate")


@dataclass(frozen=True)
class RewrittenRequest:
    """What the engine gets.

    Attributes:
        path: where it goes.
        content: the JSON body.
        original_tokens: of the prompts; None: they were not compressed.
        slots: that they became.
        is_chat: the completion that answers is to become a chat completion.
        seconds: that it took.
    """

    path: str
    content: bytes
    original_tokens: int | None = None
    slots: int = 0
    is_chat: bool = False
    seconds: float = 0.0


class RequestCompressor:
    """Rewrites requests with the encoder of a checkpoint; several threads may call it at once.

    Args:
        checkpoint: folder or Hub id. Embeddings, encoder and merger are loaded, on the CPU.

    Raises:
        ValueError: it is no SemToken checkpoint, or an engine would read its slots differently.
    """

    def __init__(self, checkpoint: str):
        self.config: Any = AutoConfig.from_pretrained(checkpoint)
        check_for_engine(self.config, checkpoint)
        with quiet_loading(True):  # the layers that stay unread are no news
            self.model: Any = AutoModel.from_pretrained(checkpoint, num_hidden_layers=0).eval()
        self._tokenizer, self._threads = AutoTokenizer.from_pretrained(checkpoint), threading.local()

    @property
    def tokenizer(self) -> Any:
        """This thread's own: a fast tokenizer serves one call at a time."""
        if not hasattr(self._threads, "tokenizer"):
            self._threads.tokenizer = copy.deepcopy(self._tokenizer)
        return self._threads.tokenizer

    def rewrite(self, path: str, content: bytes) -> RewrittenRequest:
        """The request that the engine gets in place of this one.

        Args:
            path: of the endpoint, such as /v1/completions.
            content: the body.

        Raises:
            BadRequest: it cannot be answered.
        """
        begin = time.perf_counter()
        refuse_embeds(content)
        if path not in (COMPLETIONS, CHAT):
            if path in PLAIN:
                logger.warning_once(f"SemToken does not compress {path}: such requests run the plain model")
            return RewrittenRequest(path, content)
        body = read_body(content)
        wants, ratio = own_fields(body)
        body = {name: value for name, value in body.items() if name not in OWN_FIELDS}
        field = plain_chat_reason(body) if path == CHAT else token_field_of(body)
        if wants and field is not None:
            logger.warning_once(f"SemToken does not compress requests with {field}: they run the plain model")
        if not wants or field is not None:
            return RewrittenRequest(path, json.dumps(body).encode())
        prompts = self._compress(path, body, ratio)
        tokens, slots = sum(p.original_length for p in prompts), sum(len(p.prompt_embeds) for p in prompts)
        if slots == tokens:
            return RewrittenRequest(path, json.dumps(body).encode())
        sent = completion_of_chat(body) if path == CHAT else {k: v for k, v in body.items() if k != "prompt"}
        content = with_embeds(sent, [prompt.to_base64() for prompt in prompts])
        return RewrittenRequest(COMPLETIONS, content, tokens, slots, path == CHAT, time.perf_counter() - begin)

    def _compress(self, path: str, body: dict[str, Any], ratio: float | None) -> list[Any]:
        try:
            if path == CHAT:
                return [export_pieces(self.model, self._encode_chat(body), ratio)]
            return [export_prompt(self.model, self.tokenizer, encoding, ratio) for encoding in self._encode(body)]
        except ValueError as error:
            raise BadRequest(str(error)) from error

    def _encode_chat(self, body: dict[str, Any]) -> list[Any]:
        """The encodings of a chat's pieces."""

        def encode(messages: list[dict[str, Any]]) -> Any:
            is_whole = len(messages) == len(body["messages"])
            rest = body if is_whole else {n: v for n, v in body.items() if n not in OF_LAST_TURN}
            return encode_chat(self.tokenizer, self.config, {**rest, "messages": messages})

        return chat_pieces(encode, body["messages"], self.config.min_prompt_length)

    def _encode(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """An encoding for each prompt of a completion."""
        special = body.get("add_special_tokens", True)
        rows = []
        for prompt in read_prompts(body.get("prompt"), self.config.vocab_size):
            if isinstance(prompt, str):
                prompt = self.tokenizer(prompt, add_special_tokens=bool(special))["input_ids"]
            rows.append({"input_ids": torch.tensor([prompt])})
        return rows


def with_embeds(body: dict[str, Any], embeds: list[str]) -> bytes:
    """The JSON of a body with base64 embeddings, megabytes that are not searched for what needs escaping."""
    fields = json.dumps(body)[1:]
    values = '", "'.join(embeds)
    return f'{{"prompt_embeds": ["{values}"]{", " if body else ""}{fields}'.encode()


def check_for_engine(config: Any, checkpoint: str) -> None:
    """Raise ValueError unless an engine that counts positions 0..m-1 and has no adapter reads a checkpoint's slots."""
    if not str(config.model_type).startswith("semtoken_"):
        raise ValueError(
            f"{checkpoint} has model_type {config.model_type!r}: name the SemToken folder, from which `semtoken "
            "export` wrote what the engine serves"
        )
    if config.position_mode != "compact":
        raise ValueError(
            f"{checkpoint} has position_mode={config.position_mode!r}, but an engine counts the slots 0..m-1: convert "
            "or adapt the checkpoint with position_mode='compact'"
        )
    check_config(config)


__all__ = ["CHAT", "COMPLETIONS", "RequestCompressor", "RewrittenRequest", "check_for_engine"]
