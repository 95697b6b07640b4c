"""Files and folders that appear whole or not at all: written beside their place and renamed at the end.

What a killed process leaves is named `<output>.tmp-<pid>`, or `<output>.old-<pid>` where it died between the two
renames of a replacement; `remove_stale` knows both. A loss of power is another matter: nothing is flushed to the disk.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What this process is writing; its threads share the process id.
_staged: set[Path] = set()
_lock = threading.Lock()


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
    """Clear what dead writers of `output` left; one that died between the two renames gets its old folder back."""
    if not output.parent.is_dir():
        return
    for path in list(output.parent.iterdir()):
        match = re.fullmatch(re.escape(output.name) + r"\.(tmp|old)-(\d+)(-\d+)?", path.name)
        if match is None or path in _staged or _is_running(int(match[2])):
            continue
        if match[1] == "old" and not output.exists():
            path.rename(output)
        else:
            _discard(path)


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


def _discard(path: Path) -> None:
    """Remove a file or folder, never leaving half of it under a name that counts as whole."""
    waste = path.with_name(path.name.replace(".old-", ".tmp-"))
    if waste != path:
        try:
            path.rename(waste)
        except OSError:  # gone, or in the way: another process clears up, too
            return
    if waste.is_dir():
        shutil.rmtree(waste, ignore_errors=True)
    else:
        waste.unlink(missing_ok=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Register what this process writes.

    Raises:
        FileExistsError: another thread is writing it.
    """
    with _lock:
        if path in _staged:
            raise FileExistsError(f"{path} is being written by another thread of this process")
        _staged.add(path)
    try:
        yield
    finally:
        _staged.discard(path)


@contextmanager
def staged_folder(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """A new folder `<output>.tmp-<pid>` that becomes `output` if the block ends well and is removed if it raises.

    Raises:
        FileExistsError: `output` has appeared meanwhile and `overwrite` is False, or others write it at this moment.
    """
    staged = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    replaced = output.with_name(f"{output.name}.old-{os.getpid()}")
    with _writing(staged):
        try:
            staged.mkdir(parents=True)
            yield staged
            if output.exists():
                check_output(output, overwrite, [])
                output.rename(replaced)
            try:
                staged.rename(output)
            except OSError as error:
                if output.exists():
                    raise FileExistsError(f"{output} has been written by another process meanwhile") from error
                raise
        finally:
            if replaced.exists() and not output.exists():
                replaced.rename(output)
            _discard(staged)
            _discard(replaced)


@contextmanager
def scratch_folder(output: Path) -> Iterator[Path]:
    """An empty folder beside `output` for what is needed on the way; it is gone at the end of the block."""
    scratch = output.with_name(f"{output.name}.tmp-{os.getpid()}-{threading.get_ident()}")
    with _writing(scratch):
        try:
            scratch.mkdir(parents=True)
            yield scratch
        finally:
            _discard(scratch)


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """A name beside `path` whose file becomes `path`, in place of an older one, if the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path)
    staged = path.with_name(f"{path.name}.tmp-{os.getpid()}-{threading.get_ident()}")
    with _writing(staged):
        try:
            yield staged
            staged.replace(path)
        finally:
            staged.unlink(missing_ok=True)


__all__ = ["check_output", "remove_stale", "scratch_folder", "staged_file", "staged_folder"]
