"""What a part of the suite gets and leaves behind."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..benchmarking.clock import available_bytes


class TimeUp(Exception):
    """The time of a part is used up."""


@dataclass
class Part:
    """One part of the suite.

    Attributes:
        name, title: in JSON and in Markdown.
        run: does the work, recording in its context as it goes.
        seconds: the most that it may take; None: whatever is left.
        least: it is not begun with less time than this.
    """

    name: str
    title: str
    run: Callable[[Context], None]
    seconds: float | None
    least: float = 5.0


@dataclass
class Context:
    """How a part works, and its findings.

    Attributes:
        device, dtype: of the models.
        shapes: names of the shapes to measure, the largest one last.
        lengths: prompt lengths of the benchmark.
        long_length: tokens of the long prompt.
        deadline: `time.time()` at which the part should be done.
        save: writes the report as it is.
        rows: table rows, which may have different columns.
        notes: sentences.
        checks: what was checked, and whether it held.
    """

    device: torch.device
    dtype: torch.dtype
    shapes: tuple[str, ...]
    lengths: tuple[int, ...]
    long_length: int
    deadline: float
    save: Callable[[], None] = lambda: None
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checks: dict[str, bool] = field(default_factory=dict)

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.time()

    def free_bytes(self) -> int:
        """Memory that can still be had; any amount on a processor, where the parts are only tried."""
        free = available_bytes(self.device) if self.device.type == "cuda" else None
        return 2**62 if free is None else free

    def row(self, **cells: Any) -> None:
        self.rows.append(cells)
        self.save()

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)
        self.save()

    def check(self, name: str, holds: bool) -> None:
        self.checks[name] = bool(holds)
        self.save()

    def attempt(self, what: str, call: Callable[[], Any]) -> Any:
        """The result of `call`; None, and a note, where the device has too little memory or the time is up."""
        try:
            return call()
        except TimeUp:
            reason = "the time was up"
        except torch.OutOfMemoryError as error:
            reason = f"out of memory ({str(error).splitlines()[0][:160]})"
        # Past the `except`, whose traceback holds on to the tensors.
        free_memory()
        self.note(f"{what}: {reason}.")
        return None


def free_memory() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def time_limit(model: Any, deadline: float) -> Iterator[None]:
    """Within this block, a layer of `model` that would begin behind the deadline raises TimeUp."""

    def stop(*_: Any) -> None:
        if time.time() > deadline:
            raise TimeUp

    handles = [layer.register_forward_pre_hook(stop) for layer in model.base_model.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def attention(model: Any, implementation: str, kernel: Any = None) -> Iterator[None]:
    """Within this block, the model's attention is `implementation`; of SDPA's kernels only `kernel`, if given."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        if kernel is None:
            yield
        else:
            with torch.nn.attention.sdpa_kernel(kernel):
                yield
    finally:
        model.set_attn_implementation(before)
