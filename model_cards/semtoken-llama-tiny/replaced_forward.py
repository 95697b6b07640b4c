"""A forward that others put on a model, as the fused heads of trainers: it calls the base model by itself.

The base model then learns what the call reads from `head_reads`, which the forward hands on with the arguments that it
does not know.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

# Arguments of a head that say which positions are read.
READING = ("labels", "shift_labels", "logits_to_keep")


def reads_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """What a call says of the positions that are read; empty where it says nothing of them."""
    return {name: arguments[name] for name in READING if name in arguments}


def telling_base(model: Any, forward: Any) -> Any:
    """`forward` with `head_reads` among its arguments; unchanged if it is the model's own, or takes no others."""
    function = forward.__func__ if getattr(forward, "__self__", None) is model else None
    if function is type(model).forward or not _takes_any_argument(forward):
        return forward

    @functools.wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs["head_reads"] = reads_of(kwargs) or {"labels": None}
        # A copy of the model runs its own.
        return forward(*args, **kwargs) if function is None else function(self, *args, **kwargs)

    return types.MethodType(run, model)


def _takes_any_argument(function: Callable[..., Any]) -> bool:
    try:
        # What it is called with, not what it says to stand for.
        parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


__all__ = ["READING", "reads_of", "telling_base"]
