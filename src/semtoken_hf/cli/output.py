"""What every command says, and how it ends.

- With `--json`, standard output is one JSON object and nothing else; bars, logs and errors go to standard error.
- Exit codes: 0 done, 1 it could not be done (one line says why and what to do), 2 wrong usage, 3 `doctor` found a
  fault, 130 interrupted with Ctrl-C.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

FAILED, USAGE, FAULT_FOUND, INTERRUPTED = 1, 2, 3, 130
# What the package and its libraries raise for bad input; anything else is a bug and keeps its traceback.
EXPECTED = (OSError, ValueError, TypeError, RuntimeError, ImportError)


def write_json(record: dict[str, Any]) -> None:
    """`record` as the one JSON object on standard output."""
    sys.stdout.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")


def fail(message: str, code: int = FAILED) -> NoReturn:
    """One line on standard error, and the end of the process.

    Raises:
        SystemExit: always.
    """
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


@contextlib.contextmanager
def ending_well() -> Iterator[None]:
    """Errors of bad input become one line; Ctrl-C ends with 130, after everything half-written is cleared away."""
    try:
        yield
    except KeyboardInterrupt:
        fail("interrupted; nothing half-written is left", INTERRUPTED)
    except EXPECTED as error:
        fail(str(error) or type(error).__name__)
