import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from semtoken_hf.evaluation.configuration import EvaluationConfig
from semtoken_hf.evaluation.evaluate import evaluate, measure_once, read_measured
from semtoken_hf.evaluation.jobs import complete_records, read_records, run_jobs
from tests.fixtures.children import environment
from tests.fixtures.evaluation_data import EMBEDDED

ENDLESS = """
import os, sys, time
from functools import partial
from pathlib import Path
from semtoken_hf.evaluation.jobs import run_jobs

def run(folder, job):
    (folder / str(os.getpid())).touch()
    time.sleep(60)

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
    deadline = time.monotonic() + 60
    while len(list(pids.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    workers = [int(p.name) for p in pids.iterdir()]
    assert len(workers) == 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_running, workers))


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads /proc")
def test_workers_end_with_an_interrupted_parent_which_does_not_wait_for_the_rest(tmp_path):
    script, pids = tmp_path / "endless.py", tmp_path / "pids"
    # Four jobs of a minute each are queued for two workers.
    script.write_text(ENDLESS.replace("[1, 2]", "[1, 2, 3, 4]"))
    pids.mkdir()
    parent = subprocess.Popen(
        [sys.executable, str(script), str(pids)],
        env=environment(),
        start_new_session=True,
        encoding="utf-8",
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while len(list(pids.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    # As a terminal does: to the workers, too, which say nothing.
    os.killpg(parent.pid, signal.SIGINT)
    err = parent.communicate(timeout=30)[1]
    assert err.count("Traceback") == 1
    assert "\nKeyboardInterrupt\n" in err
    workers = [int(p.name) for p in pids.iterdir()]
    assert len(workers) == 2
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


@pytest.mark.parametrize("cut", range(1, 9))
def test_half_a_character_of_a_killed_run_is_gone(tmp_path, cut):
    path, line = tmp_path / "cell.jsonl", '{"id": "b", "n": "模型"}\n'.encode()
    path.with_suffix(".partial").write_bytes(b'{"id": "a", "n": 1}\n' + line[:-cut])
    complete_records(path, {name: name for name in "ab"}, lambda name: {"id": name, "n": 2}, "title")
    # A line that lacks nothing but its end is whole.
    assert [record["n"] for record in read_records(path)] == [1, "模型" if cut == 1 else 2]


def test_a_failing_job_is_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        run_jobs(lambda n: 1 / n, [1, 0], workers=1)


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    from filelock import FileLock

    config = EvaluationConfig(str(EMBEDDED), output_dir=str(tmp_path))
    config.folder.mkdir(parents=True)
    with FileLock(config.folder / ".lock"), pytest.raises(ValueError, match="another evaluation is running"):
        evaluate(config)


def test_speed_is_measured_again_where_something_else_is_asked(tmp_path):
    config, calls = EvaluationConfig(str(EMBEDDED), output_dir=str(tmp_path)), []

    def measure(config):
        calls.append(config.lengths)
        return [{"length": n} for n in config.lengths]

    assert read_measured(config, "speed") == {"records": []}
    for lengths in ([256], [256], [256, 512]):
        config.lengths = lengths
        measure_once(config, "speed", measure)
    assert calls == [[256], [256, 512]]
    assert read_measured(config, "speed")["records"] == [{"length": 256}, {"length": 512}]
