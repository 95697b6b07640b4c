"""What every command says, and how it ends.

- With `--json`, standard output is one JSON object and nothing else; bars, logs and errors go to standard error.
- Exit codes: 0 done; 1 it could not be done, one line says why and what to do; 2 wrong usage; 3 `doctor` found a fault;
  130 interrupted with Ctrl-C; 143 terminated. A reader that has gone (`| head`) ends a command silently, with 141.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from json import JSONDecodeError
from typing import Any, NoReturn

import typer
from huggingface_hub.errors import HTTPError, StrictDataclassError  # the first of httpx or httpx2: the client's own
from rich.console import Console
from safetensors import SafetensorError
from torch import OutOfMemoryError
from tqdm.std import tqdm

FAILED, USAGE, FAULT_FOUND, INTERRUPTED, PIPE_CLOSED, TERMINATED = 1, 2, 3, 130, 141, 143
# Raised for wrong input, damaged files, a full disk, a Hub that cannot be reached, too little memory; whatever else is
# raised is a bug and keeps its traceback.
EXPECTED = (ValueError, RuntimeError, OSError, ImportError, HTTPError, SafetensorError, StrictDataclassError)
# Set to anything: expected errors keep their traceback, too.
TRACEBACK = "SEMTOKEN_TRACEBACK"


class Terminated(KeyboardInterrupt):
    """SIGTERM, which is cleared up after as Ctrl-C is."""


def write_json(record: dict[str, Any]) -> None:
    """`record` as the one JSON object on standard output."""
    sys.stdout.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
    sys.stdout.flush()


def fail(message: str, code: int = FAILED) -> NoReturn:
    """One line on standard error, and the end of the process.

    Raises:
        SystemExit: always.
    """
    close_bars()
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def close_bars() -> None:
    """End the line of every progress bar that an error has left open."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


class _Console(Console):
    def on_broken_pipe(self) -> None:
        # Rich would end the process with 1.
        raise BrokenPipeError


def console(stderr: bool = False) -> Console:
    """Rich output; colours only on a terminal and without NO_COLOR, and no line is broken in a file or pipe."""
    shown = _Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not shown.is_terminal:
        shown.soft_wrap, shown.width = True, 200
    return shown


@contextlib.contextmanager
def ending_well(resuming: str = "nothing half-written is left") -> Iterator[None]:
    """Expected errors become one line; Ctrl-C and SIGTERM end with 130 and 143, after clearing up.

    Args:
        resuming: said when interrupted: what is left, and how to go on.
    """
    try:
        with _terminating():
            yield
        sys.stdout.flush()
    except Terminated:
        _last_word(f"terminated; {resuming}", TERMINATED)
    except KeyboardInterrupt:
        _last_word(f"interrupted; {resuming}", INTERRUPTED)
    except (typer.Exit, typer.Abort):
        raise
    except EXPECTED as error:
        if isinstance(error, BrokenPipeError) and _drop_closed_streams():
            sys.exit(PIPE_CLOSED)
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        fail(explain(error))


def explain(error: BaseException) -> str:
    """What an expected error says, and what to do where it does not say so itself."""
    text = str(error) or type(error).__name__
    if isinstance(error, JSONDecodeError):
        return f"a JSON file is damaged ({text}): write or download it again"
    if isinstance(error, SafetensorError):
        return f"a safetensors file is damaged ({text}): `semtoken doctor FOLDER` says which"
    if isinstance(error, OutOfMemoryError):
        return f"{text} Use a higher --target-ratio, a shorter prompt or a smaller batch."
    if isinstance(error, HTTPError) and not isinstance(error, OSError):
        # The client's own, without the address: nothing has answered.
        return f"the Hub cannot be reached ({text}): check the network, or name a local folder"
    return text


def _last_word(message: str, code: int) -> NoReturn:
    # On a line of its own, whatever a bar or a streamed text has left.
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        close_bars()
        print(f"\n{message}" if sys.stderr.isatty() else message, file=sys.stderr)
    _drop_closed_streams()
    sys.exit(code)


@contextlib.contextmanager
def _terminating() -> Iterator[None]:
    """Within this block SIGTERM raises `Terminated`; handlers can only be set in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(*_: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _drop_closed_streams() -> bool:
    """Point standard streams without a reader to nowhere, so that the end is silent; whether there are any."""
    closed = [stream for stream in (sys.stdout, sys.stderr) if not _has_reader(stream)]
    for stream in closed:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return bool(closed)


def _has_reader(stream: Any) -> bool:
    try:
        stream.flush()
        asked = select.poll()
        asked.register(stream.fileno(), 0)
        return not any(event & select.POLLERR for _, event in asked.poll(0))
    except BrokenPipeError:
        return False
    except (AttributeError, OSError, ValueError):  # no `poll` on this system, or no file
        return True


@contextlib.contextmanager
def only_json(wanted: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """With `wanted`, whatever is printed within goes to standard error, that of children and libraries in C included.

    Yields:
        `write_json` to what standard output was; nothing happens if not `wanted`.
    """
    if not wanted:
        yield lambda record: None
        return
    records: list[dict[str, Any]] = []
    stdout = sys.stdout
    stdout.flush()
    try:
        is_real = stdout.fileno() == 1
    except (OSError, ValueError):
        is_real = False
    saved = os.dup(1) if is_real else -1
    if is_real:
        os.dup2(2, 1)
    sys.stdout = sys.stderr
    try:
        yield records.append
    finally:
        sys.stdout = stdout
        if is_real:
            os.dup2(saved, 1)
            os.close(saved)
    for record in records:
        write_json(record)


@contextlib.contextmanager
def bars(quiet: bool) -> Iterator[None]:
    """With `quiet`, no library shows a progress bar within, in this process or its children."""
    if not quiet:
        yield
        return
    shown, before = tqdm.__init__, os.environ.get("TQDM_DISABLE")

    @functools.wraps(shown)
    def hidden(self: Any, *args: Any, **kwargs: Any) -> None:
        shown(self, *args, **{**kwargs, "disable": True})

    tqdm.__init__, os.environ["TQDM_DISABLE"] = hidden, "1"
    try:
        yield
    finally:
        tqdm.__init__ = shown
        if before is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = before
