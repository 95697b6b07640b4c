"""Children of a test: other interpreters that import this package and these tests, and end in time."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import semtoken_hf

# What parent and child must agree on is printed behind this.
FACTS = "FACTS"
ROOT = Path(__file__).resolve().parents[2]


def environment(**variables: str) -> dict[str, str]:
    """This process's, with the package and the tests on the path, one thread, and no Hub."""
    paths = [str(Path(semtoken_hf.__file__).parents[1]), str(ROOT), os.environ.get("PYTHONPATH", "")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **own, **variables}


def run(command: list[str], timeout: float) -> str:
    """What `command` prints; it and all of its children are killed if it takes longer than `timeout` seconds.

    Raises:
        AssertionError: it failed or did not end in time.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=environment(), text=True, start_new_session=True, **pipes)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"still running after {timeout} s\n{out[-2000:]}\n{err[-9000:]}") from None
    assert process.returncode == 0, f"{out[-2000:]}\n{err[-9000:]}"
    return out


def run_python(code: str, *arguments: Any, timeout: float = 120) -> Any:
    """The facts that `code` prints."""
    out = run([sys.executable, "-c", code, *map(str, arguments)], timeout)
    return json.loads(out.split(FACTS)[1].splitlines()[0])


def run_ranks(module: str, folder: Path, *arguments: Any, ranks: int = 2, timeout: float = 120) -> list[Any]:
    """The facts of every rank of a module of these tests, run by `torch.distributed.run` on this machine.

    The module writes them with `write_facts`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--nnodes=1"]
    address = ["--master_addr=127.0.0.1", f"--master_port={port}"]
    run([*launcher, *address, "-m", module, str(folder), *map(str, arguments)], timeout)
    return [torch.load(folder / f"facts-{rank}.pt") for rank in range(ranks)]


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Tensors and plain values that this rank has found."""
    torch.save(facts, folder / f"facts-{os.environ['RANK']}.pt")
