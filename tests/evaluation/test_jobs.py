import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from semtoken_hf.evaluation.jobs import complete_records, read_records
from tests.fixtures.children import environment

ENDLESS = """
import os, sys, time
from functools import partial
from pathlib import Path
from semtoken_hf.evaluation.jobs import run_jobs

def run(folder, job):
    (folder / str(os.getpid())).touch()
    time.sleep(600)

if __name__ == "__main__":
    run_jobs(partial(run, Path(sys.argv[1])), [1, 2], workers=2)
"""


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie is over; only its parent has not asked yet.
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads /proc")
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    script, pids = tmp_path / "endless.py", tmp_path / "pids"
    script.write_text(ENDLESS)
    pids.mkdir()
    parent = subprocess.Popen([sys.executable, str(script), str(pids)], env=environment())
    deadline = time.monotonic() + 240
    while len(list(pids.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    workers = [int(p.name) for p in pids.iterdir()]
    assert len(workers) == 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_running, workers))


def test_lines_with_any_separator_within_survive(tmp_path):
    items = {str(i): f"one\u2028two\x85three\n{i}" for i in range(3)}
    path = tmp_path / "cell.jsonl"
    complete_records(path, items, lambda text: {"id": text[-1], "text": text}, "title")
    assert [record["text"] for record in read_records(path)] == list(items.values())
    assert not list(tmp_path.glob("*.partial"))


def test_what_was_read_is_not_read_again(tmp_path):
    path, seen = tmp_path / "cell.jsonl", []
    path.with_suffix(".partial").write_text('{"id": "a", "n": 1}\n{"id": "b", "n')

    def read(name):
        seen.append(name)
        return {"id": name, "n": 2}

    for _ in range(2):
        complete_records(path, {name: name for name in "abc"}, read, "title")
    assert seen == ["b", "c"]
    assert [record["n"] for record in read_records(path)] == [1, 2, 2]


@pytest.mark.parametrize("cut", [1, 5])
def test_half_a_character_of_a_killed_run_is_gone(tmp_path, cut):
    path, line = tmp_path / "cell.jsonl", '{"id": "b", "n": "模型"}\n'.encode()
    path.with_suffix(".partial").write_bytes(b'{"id": "a", "n": 1}\n' + line[:-cut])
    complete_records(path, {name: name for name in "ab"}, lambda name: {"id": name, "n": 2}, "title")
    # A line that lacks nothing but its end is whole.
    assert [record["n"] for record in read_records(path)] == [1, "模型" if cut == 1 else 2]
