"""One call of the package on one drawn case, and what may become of it.

A call ends in a result that an oracle finds correct, or, where plain Transformers fails on the same input, as there.
Everything else is a failure: another answer, an exception, a hang.
"""

from __future__ import annotations

import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hypothesis.strategies import SearchStrategy

SECONDS = 20.0


class Wrong(AssertionError):
    """An oracle's objection to a result."""


class Hang(BaseException):
    """The watchdog bit."""


def require(condition: Any, objection: str) -> None:
    if not condition:
        raise Wrong(objection)


@dataclass(frozen=True)
class Family:
    """Calls of one kind.

    Attributes:
        cases: draws a case: plain values whose `repr` is enough to repeat it.
        run: calls the package on a case, applies the oracle and says in a word what happened.
        plain: the same call of plain Transformers, if there is one; its exception excuses ours of the same type.
        weight: its share of a campaign.
    """

    cases: SearchStrategy[Any]
    run: Callable[[Any], str]
    plain: Callable[[Any], Any] | None = None
    weight: float = 1.0


@dataclass
class Verdict:
    """What became of a call: "result", "as in Transformers" or "failure", and what was seen or raised."""

    kind: str
    detail: str
    trace: str = field(default="", repr=False)


@contextmanager
def watchdog(seconds: float) -> Iterator[None]:
    """Raise `Hang` in the block after this many seconds."""

    def bite(*_: Any) -> None:
        raise Hang(f"still running after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, bite)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def judge(family: Family, case: Any) -> Verdict:
    """Make the call of `case`; never raises but for an interrupt."""
    try:
        with watchdog(SECONDS):
            return Verdict("result", family.run(case))
    except (Wrong, Hang) as error:
        return Verdict("failure", f"{type(error).__name__}: {error}", trace=traceback.format_exc())
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of Rust is no Exception
        return _judge_exception(family, case, error)


def _judge_exception(family: Family, case: Any, error: BaseException) -> Verdict:
    trace, kind = traceback.format_exc(), type(error).__name__
    if family.plain is not None:
        try:
            with watchdog(SECONDS):
                family.plain(case)
        except BaseException as theirs:
            if type(theirs) is type(error):
                return Verdict("as in Transformers", kind)
            trace += f"\nplain Transformers: {type(theirs).__name__}: {theirs}"
    return Verdict("failure", f"{kind}: {str(error)[:300]}", trace=trace)
