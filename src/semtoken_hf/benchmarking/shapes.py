"""Sizes of the models that are measured.

Of the package it imports nothing: the environment of the kvpress baselines, which cannot install it, loads it too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class ModelShape:
    """A Llama by its sizes.

    Attributes:
        vocab_size: at least; a tokenizer with more ids has its variant.
        dtype: of the weights, unless the caller says otherwise.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int = 32000
    dtype: str = "bfloat16"
    rope_theta: float = 10000.0

    def config_fields(self, vocab_size: int, positions: int) -> dict[str, Any]:
        """What `LlamaConfig` is made of, for prompts of up to `positions` tokens."""
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        return {
            **{name: getattr(self, name) for name in sizes},
            "vocab_size": max(self.vocab_size, vocab_size),
            "max_position_embeddings": positions,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
        }

    def slot_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the keys and values of one slot, over all layers."""
        return 2 * self.num_hidden_layers * self._width_of_keys * dtype.itemsize

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the weights, those of an untied head included, those of the norms left out."""
        attention = 2 * self.hidden_size * (self.hidden_size + self._width_of_keys)
        layer = attention + 3 * self.hidden_size * self.intermediate_size
        return dtype.itemsize * (self.num_hidden_layers * layer + 2 * self.vocab_size * self.hidden_size)

    @property
    def _width_of_keys(self) -> int:
        return self.hidden_size // self.num_attention_heads * self.num_key_value_heads


SHAPES = {
    # For tests, and for prompts of a million tokens.
    "tiny": ModelShape(64, 128, 2, 4, 2, vocab_size=8192, dtype="float32"),
    "160m": ModelShape(768, 3072, 12, 12, 12, dtype="float32"),
    "1.1b": ModelShape(2048, 5632, 22, 32, 4),
    "llama-2-7b": ModelShape(4096, 11008, 32, 32, 32),
    "llama-3-8b": ModelShape(4096, 14336, 32, 32, 8, vocab_size=128256, rope_theta=500000.0),
}


def shape_of(name: str) -> ModelShape:
    """A shape by its name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in SHAPES:
        raise ValueError(f"there is no model shape {name!r}; there are {', '.join(SHAPES)}")
    return SHAPES[name]


def dtype_of(name: str) -> torch.dtype:
    """A floating dtype of PyTorch by its name.

    Raises:
        ValueError: PyTorch has none of that name.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"--dtype must name a floating dtype of PyTorch such as bfloat16, got {name!r}")
    return dtype


__all__ = ["SHAPES", "ModelShape", "dtype_of", "shape_of"]
