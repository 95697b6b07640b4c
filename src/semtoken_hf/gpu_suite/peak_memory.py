"""The most memory that a call takes beyond what was held before it."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import torch

from .parts import free_memory

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _return_freed() -> None:
    """Hand the heap's free pages back, where the C library can: they would hide what is taken next."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


class PeakMemory:
    """`with PeakMemory(device) as peak: ...`, then `peak.bytes`: on a GPU of the allocator, else of the process.

    `peak.bytes` is None where the system does not tell: outside Linux, or where the mark cannot be reset.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        free_memory()
        self.before: int | None = None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
            return self
        _return_freed()
        try:
            CLEAR.write_text("5")
            self.before = _status_bytes("VmRSS")
        except OSError:
            pass
        return self

    def __exit__(self, *_: object) -> None:
        if self.before is None:
            return
        on_gpu = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if on_gpu else _status_bytes("VmHWM")
        self.bytes = max(peak - self.before, 0)
