"""The parts in order of worth, and how they are run: each alone, within its time, whatever happens to the others."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace

import torch

from .benchmark import run_benchmark
from .equivalence import check_equivalence
from .gpu_tests import run_gpu_tests
from .host_syncs import count_host_syncs
from .machine import describe_machine
from .million_tokens import stream_million_tokens
from .parts import Context, Part, free_memory
from .products import multiply_gains
from .report import RUNNING, Report

PARTS = (
    Part("environment", "Environment", describe_machine, 20),
    Part("equivalence", "Attention backends against eager in float32; plans", check_equivalence, 60),
    Part("host_syncs", "How often the host waits for the device", count_host_syncs, 30),
    Part("gpu_tests", "pytest -m gpu", run_gpu_tests, 70),
    Part("products", "FlashAttention and PagedAttention multiply", multiply_gains, 65, least=15),
    Part("benchmark", "Benchmark", run_benchmark, 110, least=20),
    Part("million_tokens", "One million tokens", stream_million_tokens, None, least=20),
)
# A part that ignores its deadline for so long is killed with its process.
GRACE = 20.0
# A part that stops at the end of all time still writes its findings.
CLOSING = 5.0
# Of a worker whose device no longer answers: the next parts need a new process.
BROKEN_DEVICE = 3


def device_answers() -> bool:
    """Whether the device still works: some errors stay with a process to its end."""
    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
    except Exception:
        return False
    return True


def run_part(part: Part, context: Context, report: Report, deadline: float) -> None:
    """Run one part and record how it went; no exception of the part gets out."""
    left = deadline - time.time()
    if left < part.least:
        report.update(part.name, status="skipped", reason=f"no time left ({max(left, 0):.0f} s)")
        return
    seconds = left if part.seconds is None else min(part.seconds, left)
    start = time.time()
    context = replace(context, deadline=start + seconds, rows=[], notes=[], checks={}, save=report.save)
    live = {"rows": context.rows, "notes": context.notes, "checks": context.checks}
    report.update(part.name, status=RUNNING, limit=start + seconds + GRACE, **live)
    try:
        part.run(context)
    except Exception as error:
        outcome = {
            "status": "failed",
            "reason": f"{type(error).__name__}: {str(error)[:300]}",
            "traceback": traceback.format_exc(),
        }
    else:
        outcome = {"status": "done"}
    free = device_answers()
    report.update(part.name, seconds=time.time() - start, **outcome)
    if free:
        free_memory()


def run_parts(context: Context, report: Report, deadline: float, parts: Sequence[Part] = PARTS) -> bool:
    """Run what the report says is still to do, in this process; False if its device no longer answers."""
    by_name = {part.name: part for part in parts}
    while (name := report.next_pending()) is not None:
        run_part(by_name[name], context, report, deadline)
        if not device_answers():
            return False
    return True


def supervise(command: Sequence[str], report: Report, deadline: float, environment: dict[str, str]) -> Report:
    """Run workers (`command`) until nothing is left to do: one that dies or hangs costs the part that it was at.

    Returns:
        the report as the workers left it.
    """
    while report.next_pending() is not None:
        if time.time() > deadline:
            _give_up(report, "skipped", "no time left")
            break
        worker = subprocess.Popen(command, env={**os.environ, **environment})
        try:
            reason = _watch(worker, report, deadline)
        finally:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
        seen = Report.load(report.output)
        name = seen.running()
        if name is not None:
            seen.update(name, status="killed", reason=reason)
        elif seen.next_pending() == report.next_pending():
            # It did not get as far as its first part, and the next one would not either.
            _give_up(seen, "failed", f"the worker did not start ({reason})")
        report = seen
    return report


def _give_up(report: Report, status: str, reason: str) -> None:
    while (name := report.next_pending()) is not None:
        report.update(name, status=status, reason=reason)


def _watch(worker: subprocess.Popen[bytes], report: Report, deadline: float) -> str:
    """Wait for a worker; why it is over."""
    while worker.poll() is None:
        time.sleep(0.2)
        seen = Report.load(report.output)
        name = seen.running()
        if time.time() > min(seen.parts[name]["limit"] if name else deadline, deadline) + CLOSING:
            return "it ran beyond its time"
    return f"its process ended with code {worker.returncode}"


def worker_command(arguments: Sequence[str]) -> list[str]:
    """The same program with the same arguments, as a worker."""
    return [sys.executable, sys.argv[0], *arguments, "--worker"]
