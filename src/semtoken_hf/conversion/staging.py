"""A folder that appears whole or not at all: written beside its place and renamed at the end."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_output(output: Path, overwrite: bool, sources: list[Path]) -> None:
    """Raise unless `output` may be written.

    Raises:
        FileExistsError: it exists and `overwrite` is False, or it is no checkpoint.
        ValueError: it holds one of `sources`.
    """
    if not output.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{output} exists; choose another folder or pass overwrite=True")
    if any(source.resolve().is_relative_to(output) for source in sources):
        raise ValueError(f"{output} holds what the conversion reads; choose another folder")
    if not output.is_dir() or (any(output.iterdir()) and not (output / "config.json").is_file()):
        raise FileExistsError(f"{output} is no checkpoint and will not be overwritten; choose another folder")


def remove_stale(output: Path) -> None:
    """Clear what dead conversions to `output` left; one that died between the two renames gets its old folder back."""
    if not output.parent.is_dir():
        return
    for path in output.parent.iterdir():
        match = re.fullmatch(re.escape(output.name) + r"\.(tmp|old)-(\d+)", path.name)
        if match is None or _is_running(int(match[2])):
            continue
        if match[1] == "old" and not output.exists():
            path.rename(output)
        else:
            shutil.rmtree(path)


def _is_running(pid: int) -> bool:
    """Whether another process of this machine has the id; always True where that cannot be asked without harm."""
    if os.name != "posix":
        return True
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def staged_folder(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """A new folder `<output>.tmp-<pid>` that becomes `output` if the block ends well and is removed if it raises.

    Raises:
        FileExistsError: `output` has appeared meanwhile and `overwrite` is False.
    """
    staged = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    replaced = output.with_name(f"{output.name}.old-{os.getpid()}")
    staged.mkdir(parents=True)
    try:
        yield staged
        if output.exists():
            check_output(output, overwrite, [])
            output.rename(replaced)
        staged.rename(output)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


__all__ = ["check_output", "remove_stale", "staged_folder"]
