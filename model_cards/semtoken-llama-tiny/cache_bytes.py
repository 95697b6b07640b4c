"""What the keys and values of any cache take; of the package it imports nothing, so that a file alone can be loaded."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# Of a quantised layer, beside its most recent keys and values.
QUANTIZED = ("_quantized_keys", "_quantized_values")


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values of any cache with layers, quantised or not."""
    names = ("keys", "values", *QUANTIZED)
    return sum(_nbytes(getattr(layer, name, None)) for layer in cache.layers for name in names)


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        if is_traceable_wrapper_subclass(value):
            return sum(_nbytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return 0
    return sum(_nbytes(item) for item in value)


def is_quantized(cache: Any) -> bool:
    """Whether any layer keeps its states in a quantised form, or will."""
    # Before 5.21, an empty layer does not have `QUANTIZED` yet.
    return any(hasattr(layer, "_dequantize") for layer in cache.layers)


__all__ = ["cache_bytes", "is_quantized"]
