"""Writing reports so that a file is whole or not there, by one run at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..conversion.staging import staged_file


def write_text(path: Path, text: str) -> None:
    """Write `text` beside `path`, then rename it."""
    with staged_file(path) as staged:
        staged.write_text(text, encoding="utf-8")


@contextmanager
def only_run_in(folder: Path, kind: str) -> Iterator[None]:
    """Hold `folder`, which is made, until the block or the process ends.

    Args:
        kind: what runs, for the message.

    Raises:
        ValueError: another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another {kind} is running in {folder}: wait for it, or stop it") from None
    with held:
        yield


__all__ = ["only_run_in", "write_text"]
