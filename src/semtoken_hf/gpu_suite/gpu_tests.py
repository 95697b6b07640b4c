"""Part: the tests that need a GPU, in a process of their own."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

from .models import ROOT
from .parts import Context

# Left for what follows in this part: reading the output and ending the child.
MARGIN = 3.0
# Of pytest: nothing was collected.
NOTHING = 5


def run_gpu_tests(context: Context, folder: str = "tests/gpu") -> None:
    """`pytest -m gpu`, ended when the part's time is up."""
    if importlib.util.find_spec("pytest") is None:
        return context.note("Skipped: pytest is not installed.")
    if not (ROOT / folder).is_dir():
        return context.note(f"Skipped: there is no {folder} here.")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rA", "--tb=short", "-p", "no:cacheprovider", folder]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=max(context.left() - MARGIN, 1),
        )
        output, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        output, code = (error.stdout or b"").decode(errors="replace"), None
        context.note("The time was up before the tests were through.")
    outcomes = re.findall(r"^(PASSED|FAILED|ERROR|SKIPPED)\s+(.*)$", output, re.MULTILINE)
    for outcome, what in outcomes:
        context.row(outcome=outcome.lower(), test=what[:200])
    if code not in (0, None, NOTHING):
        context.note("Last lines: " + " / ".join(output.splitlines()[-5:]))
    # Stopped, empty or skipped throughout is neither.
    if code not in (None, NOTHING) and any(outcome != "SKIPPED" for outcome, _ in outcomes):
        context.check("pytest -m gpu", code == 0)
    else:
        context.note("No test ran to its end.")
