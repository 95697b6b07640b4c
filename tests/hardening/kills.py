"""Killing a program at a chosen change of its folder, or failing its writes, and looking at what it leaves.

A change is a file opened for writing, a rename, or a new or removed folder, as Python's audit hooks see them.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import shutil
import signal
import sys
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

RENAMES = {"os.rename", "os.link", "os.symlink"}
REMOVALS = {"os.remove", "os.rmdir"}
TIMEOUT = 300.0


@dataclass(frozen=True)
class Moment:
    """When a run is disturbed, and how.

    Attributes:
        change: just before its change number `change` of the folder; 0: never.
        action: "kill"; "interrupt" as Ctrl-C does; "full": from then on nothing can be written; "read-only": nor moved
            or removed.
    """

    change: int = 0
    action: str = "kill"


NEVER = Moment()


@dataclass
class Outcome:
    """What came of the kills of one program."""

    runs: int = 0
    kills: int = 0
    failures: list[str] = field(default_factory=list)


def fork_server() -> Any:
    """A context whose children start in milliseconds, with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.hardening.kills", "tests.hardening.kill_jobs"])
    # It takes the path of modules from there alone, and says nothing of what it cannot import.
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def kind_of_change(event: str, arguments: tuple, folder: str) -> str | None:
    """ "write", "rename" or "removal" of something in `folder`; None for any other event."""
    if not arguments or not isinstance(arguments[0], (str, os.PathLike)):
        return None
    if not os.fspath(arguments[0]).startswith(folder):
        return None
    if event == "open":
        flags = arguments[2]
        return "write" if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else None
    if event == "os.mkdir":
        return "write"
    return "rename" if event in RENAMES else "removal" if event in REMOVALS else None


def watch(folder: str, moment: Moment) -> list[str]:
    """Disturb this process at `moment`, from now to its end; returns the changed paths as they come."""
    changes: list[str] = []

    def hook(event: str, arguments: tuple) -> None:
        kind = kind_of_change(event, arguments, folder)
        if kind is None:
            return
        changes.append(os.fspath(arguments[0]))
        if not moment.change or len(changes) < moment.change:
            return
        if moment.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if moment.action == "interrupt" and len(changes) == moment.change:
            raise KeyboardInterrupt
        if moment.action == "full" and kind == "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), arguments[0])
        if moment.action == "read-only":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), arguments[0])

    sys.addaudithook(hook)
    return changes


def _child(name: str, inputs: Path, work: Path, variant: str, moment: Moment, plots: bool, pipe: Any) -> None:
    """Run a job; say at the end what it raised, or how many changes there were."""
    from tests.hardening.kill_jobs import JOBS

    if not plots and name == "evaluate":  # it goes without
        sys.modules["matplotlib"] = None  # type: ignore[assignment]
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    changes = watch(str(work), moment)
    try:
        JOBS[name].run(inputs, work, variant)
        pipe.send(len(changes))
    except BaseException as error:  # Ctrl-C, too
        pipe.send(f"{type(error).__name__}: {error}")
    # Without the interpreter's long farewell.
    os._exit(0)


class Killer:
    """Runs of one program in a folder, disturbed or not."""

    def __init__(self, name: str, folder: Path, plots: bool = False):
        from tests.hardening.kill_jobs import JOBS

        self.name, self.folder, self.plots, self.job = name, folder, plots, JOBS[name]
        self.context, self.inputs = fork_server(), folder / "inputs"
        self.inputs.mkdir(parents=True)
        self.job.prepare(self.inputs)
        self.whole: dict[str, Any] = {}
        self.changes: dict[str, int] = {}

    def start(self, work: Path, variant: str, moment: Moment = NEVER) -> tuple[Any, Any]:
        """A running process, and the end of the pipe that it will write to."""
        ours, theirs = self.context.Pipe(duplex=False)
        arguments = (self.name, self.inputs, work, variant, moment, self.plots, theirs)
        process = self.context.Process(target=_child, args=arguments)
        process.start()
        theirs.close()
        return process, ours

    def end(self, process: Any, pipe: Any) -> int | str | None:
        """The number of its changes, what it raised, or None if it was killed."""
        process.join(TIMEOUT)
        if process.exitcode is None:
            process.kill()
            raise AssertionError(f"{self.name} still ran after {TIMEOUT} s")
        return None if process.exitcode == -signal.SIGKILL else pipe.recv()

    def run(self, work: Path, variant: str, moment: Moment = NEVER) -> int | str | None:
        """Run the program to its end or its kill: as `end`."""
        return self.end(*self.start(work, variant, moment))

    def finish(self, work: Path, variant: str) -> int:
        """Run the program to its end.

        Raises:
            AssertionError: it raises.
        """
        found = self.run(work, variant)
        assert isinstance(found, int), f"{self.name} raised {found}"
        return found

    def undisturbed(self, variant: str) -> Any:
        """The result of a run that nothing disturbs."""
        if variant not in self.whole:
            work = self.folder / f"whole-{variant}"
            self.job.start(self.inputs, work, variant)
            self.changes[variant] = self.finish(work, variant)
            self.whole[variant] = self.job.result(work)
            assert not self.job.leftovers(work)
        return self.whole[variant]

    def fresh(self, variant: str) -> Path:
        """A folder to work in, as it is before the program."""
        self.undisturbed(variant)
        work = self.folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        self.job.start(self.inputs, work, variant)
        return work

    def check_end(self, work: Path, variant: str) -> None:
        """Run the program again; raises AssertionError where the result is not that of an undisturbed run."""
        self.finish(work, variant)
        assert self.job.result(work) == self.whole[variant], "resuming ends with another result"
        assert not (left := self.job.leftovers(work)), f"left behind: {sorted(left)}"

    def kill(self, times: int, seed: int = 0) -> Outcome:
        """Kill `times` runs at random changes, variants in turn, and let each finish; every fifth is killed twice."""
        generator, outcome = random.Random(f"{self.name} {seed}"), Outcome()
        while outcome.kills < times:
            variant = self.job.variants[outcome.runs % len(self.job.variants)]
            self.undisturbed(variant)
            drawn = 2 if outcome.runs % 5 == 4 else 1
            moments = [Moment(generator.randint(1, self.changes[variant])) for _ in range(drawn)]
            outcome.runs += 1
            try:
                self._kill_and_resume(variant, moments, outcome)
            except AssertionError as error:
                outcome.failures.append(f"{self.name} {variant} {moments}: {error}")
        return outcome

    def _kill_and_resume(self, variant: str, moments: list[Moment], outcome: Outcome) -> None:
        work = self.fresh(variant)
        for moment in moments:
            # A resumed run may end before its change has come.
            outcome.kills += self.run(work, variant, moment) is None
            self.job.check(work, self.whole[variant])
        self.check_end(work, variant)
