"""Where the seconds of the compression stage go, whoever calls its parts and with what."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn
from torch.utils.benchmark import timer

PACKAGE = __name__.split(".")[0]
ENCODER, REST = "encoder", "rest"
# Functions of the stage, and what their own seconds are called; the rest is the outermost one's.
PARTS = {
    "compress_prompt": REST,
    "build_layout": "layout",
    "find_span_starts": "span starts",
    "merge_spans": "merging",
}


def replace_everywhere(replacements: dict[str, Callable[[Any], Any]]) -> list[tuple[Any, str, Any]]:
    """Replace functions of the package, by name, in every module that looks them up.

    Returns:
        (module, name, original), to be put back.
    """
    replaced = []
    for module in [m for name, m in sys.modules.items() if name.startswith(PACKAGE + ".")]:
        for name, replacement in replacements.items():
            original = vars(module).get(name)
            if callable(original):
                replaced.append((module, name, original))
                setattr(module, name, replacement(original))
    return replaced


class StageClock:
    """Adds up the exclusive seconds of the encoder and of `PARTS`, between `with` and its end.

    It waits for the device before and after each of them, so that the sum is more than the stage takes undisturbed.

    Attributes:
        seconds: by the names of the parts, "encoder" and "rest".
        calls: how often each ran.
    """

    def __init__(self, encoder: nn.Module):
        self.encoder = encoder
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self._running: list[str] = []
        self._since = 0.0

    def __enter__(self) -> StageClock:
        parts: dict[str, Any] = {name: lambda f, part=part: self._timed(f, part) for name, part in PARTS.items()}
        self._replaced = replace_everywhere(parts)
        self._own_forward = vars(self.encoder).get("forward")
        self.encoder.forward = self._timed(self.encoder.forward, ENCODER)
        return self

    def __exit__(self, *_: Any) -> None:
        for module, name, original in self._replaced:
            setattr(module, name, original)
        if self._own_forward is None:
            del self.encoder.forward
        else:
            self.encoder.forward = self._own_forward

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._note()
            self._running.append(part)
            self.calls[part] += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._note()
                self._running.pop()

        return call

    def _note(self) -> None:
        now = timer()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now


class ReplayedEncoder:
    """Between `with` and its end, the encoder hands out what it found in the calls before: fingerprints for nothing.

    Args:
        encoder: deterministic.
        call: runs the stage once, to learn the fingerprints.
    """

    def __init__(self, encoder: nn.Module, call: Callable[[], Any]):
        self.encoder = encoder
        self.states: list[Any] = []
        hook = encoder.register_forward_hook(lambda module, inputs, output: self.states.append(output))
        try:
            call()
        finally:
            hook.remove()
        self._next = 0

    def __enter__(self) -> ReplayedEncoder:
        self.encoder.forward = self._replay
        return self

    def __exit__(self, *_: Any) -> None:
        del self.encoder.forward

    def _replay(self, *_: Any, **__: Any) -> Any:
        state = self.states[self._next % len(self.states)]
        self._next += 1
        return state


__all__ = ["ENCODER", "PARTS", "REST", "ReplayedEncoder", "StageClock", "replace_everywhere"]
