"""Ray Data on a local cluster of two workers writes what `datasets.map` writes; `scripts/ray_test.sh` runs it."""

from __future__ import annotations

import signal
import time

import pytest

from semtoken_hf.bulk import BulkOptions, compress_dataset
from tests.bulk.conftest import TEXTS
from tests.fixtures.command_line import run_command, run_json, start_command
from tests.fixtures.evaluation_data import write_rows

pytest.importorskip("ray.data", reason="Ray Data is not installed: bash scripts/ray_test.sh")


@pytest.fixture(scope="module", autouse=True)
def _own_home(tmp_path_factory):
    """Ray keeps the token of its clusters in the home folder, and reads it once a process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_both_engines_write_the_same(checkpoint, source, tmp_path):
    for kind in ("prefixes", "prompt-embeds"):
        options = BulkOptions(str(checkpoint), str(source), kind=kind, shard_size=2)
        for engine, workers in (("datasets", 1), ("ray", 2)):
            record = compress_dataset(options, tmp_path / kind / engine, engine, workers, progress=False)
            assert record["written"] == 3
        assert contents(tmp_path / kind / "ray") == contents(tmp_path / kind / "datasets")


def test_what_a_worker_raises_is_said(stripping_checkpoint, source, tmp_path):
    (source / "blank.txt").write_text(" \n")
    command = ("compress-dataset", stripping_checkpoint, source, tmp_path / "out", "--engine", "ray", "--quiet")
    assert "error: document 'blank.txt': `prefix` must be" in run_command(*command, code=1).stderr


def test_a_killed_run_is_gone_on_with(checkpoint, tmp_path):
    rows = [{"text": f"{n} {TEXTS['part-1']}"} for n in range(100)]
    file, out = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    command = ("compress-dataset", checkpoint, file, out, "--shard-size", 1, "--quiet")
    child = start_command(*command, "--engine", "ray", "--workers", 2)
    while not list(out.glob("shard-*.safetensors")):
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.01)
    child.kill()
    assert child.wait(60) == -signal.SIGKILL
    assert 0 < run_json(*command, "--engine", "ray", "--workers", 2)["written"] < 100
    undisturbed = tmp_path / "undisturbed"
    run_json("compress-dataset", checkpoint, file, undisturbed, "--shard-size", 1, "--quiet")
    assert contents(out) == contents(undisturbed)
