"""One call of the package on one drawn case, and what may become of it.

A call ends in a result that an oracle finds correct, or in an exception of a documented kind that says what was wrong.
Everything else is a failure: another answer, an accident from deep inside, a hang, memory beyond the bound.
"""

from __future__ import annotations

import linecache
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from hypothesis.strategies import SearchStrategy

SECONDS = 20.0
MEGABYTE = 2**20
# What the package and, for the fields of a family, Transformers' typed configurations document.
DOCUMENTED = (ValueError, TypeError, OSError, ImportError, StrictDataclassError)


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
        names: what a refusal of this case may complain about; nothing where the case is valid.
        plain: the same call of plain Transformers, if there is one; its exception excuses ours of the same type.
        excuses: of messages that are Transformers' own, whatever the type.
        weight: its share of a campaign.
        megabytes: how much the resident memory may grow during a call.
    """

    cases: SearchStrategy[Any]
    run: Callable[[Any], str]
    names: Callable[[Any], tuple[str, ...]]
    plain: Callable[[Any], Any] | None = None
    excuses: tuple[str, ...] = ()
    weight: float = 1.0
    megabytes: int = 256


@dataclass
class Verdict:
    """What became of a call.

    Attributes:
        kind: "result", "refusal", "as in Transformers" or "failure".
        detail: what the oracle saw, the exception's type, or what went wrong.
        seconds: how long it took.
        megabytes: growth of the resident memory at its highest.
        trace: of a failure.
    """

    kind: str
    detail: str
    seconds: float = 0.0
    megabytes: float = 0.0
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


def resident() -> tuple[float, float]:
    """Megabytes of resident memory now, and at most since `forget_peak`."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "VmHWM"))}
        return int(found["VmRSS"]) / 1024, int(found["VmHWM"]) / 1024
    except (OSError, KeyError):  # no Linux: what there was at most can only grow
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return peak, peak


def forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def judge(family: Family, case: Any) -> Verdict:
    """Make the call of `case`; never raises."""
    forget_peak()
    before, start = resident()[0], time.perf_counter()
    try:
        with watchdog(SECONDS):
            verdict = Verdict("result", family.run(case))
    except (Wrong, Hang) as error:
        verdict = Verdict("failure", f"{type(error).__name__}: {error}", trace=traceback.format_exc())
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of Rust is no Exception
        verdict = _judge_exception(family, case, error)
    verdict.seconds, verdict.megabytes = time.perf_counter() - start, resident()[1] - before
    if verdict.megabytes > family.megabytes and verdict.kind != "failure":
        verdict.kind = "failure"
        verdict.detail = f"memory grew by {verdict.megabytes:.0f} MB, allowed are {family.megabytes} ({verdict.detail})"
    return verdict


def _judge_exception(family: Family, case: Any, error: BaseException) -> Verdict:
    trace, kind = traceback.format_exc(), type(error).__name__
    names, message = family.names(case), str(error)
    if isinstance(error, DOCUMENTED) and any(name in message for name in names) and is_on_purpose(error):
        return Verdict("refusal", kind)
    if any(excuse in message for excuse in family.excuses):
        return Verdict("as in Transformers", kind)
    if family.plain is not None:
        try:
            with watchdog(SECONDS):
                family.plain(case)
        except BaseException as theirs:
            if type(theirs) is type(error):
                return Verdict("as in Transformers", kind)
            trace += f"\nplain Transformers: {type(theirs).__name__}: {theirs}"
    why = "a valid call" if not names else f"names none of {names}" if is_on_purpose(error) else "an accident"
    return Verdict("failure", f"{kind}, {why}: {message[:300]}", trace=trace)


def is_on_purpose(error: BaseException) -> bool:
    """Whether somebody wrote `raise` for it, where an accident comes from an expression that failed."""
    frames = list(traceback.walk_tb(error.__traceback__))
    if not frames:
        return False
    frame, number = frames[-1]
    return linecache.getline(frame.f_code.co_filename, number).strip().startswith("raise")
