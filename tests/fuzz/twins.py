"""Models of every family, attention and dtype, made once a process, and their plain twins."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tests.fixtures.tiny import plain_twin, tiny_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTIONS = ("eager", "sdpa", "semtoken_varlen")
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@functools.cache
def model_of(family: str, attention: str, dtype: str) -> Any:
    heads = {"head_dim": 8} if family == "qwen3" else {}
    fields = {**SIZES, **heads, "attn_implementation": attention, "pad_token_id": 0}
    return tiny_model(family=family, dtype=DTYPES[dtype], **fields).requires_grad_(False)


@functools.cache
def plain_of(family: str, attention: str, dtype: str) -> Any:
    """The plain twin; of ragged attention, that of SDPA."""
    if attention == "semtoken_varlen":
        return plain_of(family, "sdpa", dtype)
    return plain_twin(model_of(family, attention, dtype)).requires_grad_(False)


@contextmanager
def configured(model: Any, fields: dict[str, Any]) -> Iterator[Any]:
    """`model` with other compression fields within the block."""
    before = {name: getattr(model.config, name) for name in fields}
    for name, value in fields.items():
        setattr(model.config, name, value)
    try:
        yield model
    finally:
        for name, value in before.items():
            setattr(model.config, name, value)
