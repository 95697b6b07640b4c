from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from semtoken_hf import SemTokenLlamaForCausalLM, convert_checkpoint
from semtoken_hf.conversion.staging import check_output, remove_stale, staged_file, staged_folder
from semtoken_hf.evaluation.files import write_text
from tests.fixtures.children import environment

# Stops for good at the second call of a function, so that the test kills it at a known place.
SCRIPT = """
import pathlib, sys, time
import semtoken_hf.conversion.weights as weights
from semtoken_hf import convert_checkpoint

owner, name = {"write": (weights, "save_file"), "swap": (pathlib.Path, "rename")}[sys.argv[1]]
original, calls = getattr(owner, name), []

def stop_at_second(*args, **kwargs):
    calls.append(args)
    if len(calls) == 2:
        print("reached", flush=True)
        time.sleep(600)
    return original(*args, **kwargs)

setattr(owner, name, stop_at_second)
convert_checkpoint(*sys.argv[2:5], max_shard_size="20KB", progress=False, overwrite=sys.argv[1] == "swap")
"""


def kill_conversion(where: str, source: Path, encoder: Path, output: Path) -> int:
    """SIGKILL a conversion at the second weight file or at the second rename; returns its process id."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, where, str(source), str(encoder), str(output)],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "reached\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    return process.pid


def test_killed_conversion_leaves_no_checkpoint(make_llama, encoder_folder, tmp_path):
    source, output = make_llama(), tmp_path / "out"
    pid = kill_conversion("write", source, encoder_folder, output)
    assert not output.exists()
    stale = tmp_path / f"out.tmp-{pid}"
    assert len(list(stale.glob("*.safetensors"))) == 1
    convert_checkpoint(source, encoder_folder, output, progress=False)
    assert not stale.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["encoder", "llama", "out"]
    assert SemTokenLlamaForCausalLM.from_pretrained(output)


def test_killed_between_the_two_renames_the_old_checkpoint_comes_back(make_llama, encoder_folder, tmp_path):
    source, output = make_llama(), tmp_path / "out"
    convert_checkpoint(source, encoder_folder, output, progress=False, target_ratio=3)
    pid = kill_conversion("swap", source, encoder_folder, output)
    assert not output.exists()
    assert (tmp_path / f"out.old-{pid}").exists()
    with pytest.raises(FileExistsError):
        convert_checkpoint(source, encoder_folder, output, progress=False)
    assert SemTokenLlamaForCausalLM.from_pretrained(output).config.target_ratio == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["encoder", "llama", "out"]


def test_existing_output_is_kept_unless_asked(make_llama, encoder_folder, tmp_path):
    source, output = make_llama(), tmp_path / "new" / "out"
    convert_checkpoint(source, encoder_folder, output, progress=False, target_ratio=3)
    written = (output / "config.json").read_bytes()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        convert_checkpoint(source, encoder_folder, output, progress=False)
    with pytest.raises(ValueError, match="target_ratio"):
        convert_checkpoint(source, encoder_folder, output, progress=False, overwrite=True, target_ratio=0)
    with pytest.raises(ValueError, match="many"):
        convert_checkpoint(source, encoder_folder, output, progress=False, overwrite=True, max_shard_size="many")
    assert (output / "config.json").read_bytes() == written
    (output / "leftover.txt").write_text("of the old one")
    convert_checkpoint(source, encoder_folder, output, progress=False, overwrite=True, target_ratio=5)
    assert SemTokenLlamaForCausalLM.from_pretrained(output).config.target_ratio == 5
    assert not (output / "leftover.txt").exists()
    assert list(output.parent.iterdir()) == [output]


def test_sources_and_other_folders_are_never_overwritten(make_llama, encoder_folder, tmp_path):
    source = make_llama()
    for target in (source, encoder_folder, tmp_path):
        with pytest.raises(ValueError, match="holds what the conversion reads"):
            convert_checkpoint(source, encoder_folder, target, progress=False, overwrite=True)
    precious = tmp_path / "precious"
    precious.mkdir()
    check_output(precious, True, [])
    (precious / "thesis.txt").write_text("...")
    with pytest.raises(FileExistsError, match="is no checkpoint"):
        convert_checkpoint(source, encoder_folder, precious, progress=False, overwrite=True)
    assert (precious / "thesis.txt").exists()


def test_only_what_dead_conversions_left_is_removed(tmp_path):
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    dead, alive = finished.pid, os.getppid()
    names = [f"out.tmp-{dead}", f"out.tmp-{alive}", f"out.tmp-{os.getpid()}", f"out2.tmp-{dead}", f"xout.tmp-{dead}"]
    names += ["out.tmp-1x", "outXtmp-9"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    remove_stale(tmp_path / "out")
    left = {p.name for p in tmp_path.iterdir()}
    assert left == set(names) - {f"out.tmp-{dead}", f"out.tmp-{os.getpid()}"}


def test_output_that_appears_meanwhile_wins(tmp_path):
    output = tmp_path / "out"

    def stage() -> None:
        with staged_folder(output) as staged:
            (staged / "config.json").touch()
            output.mkdir()
            (output / "theirs").touch()

    with pytest.raises(FileExistsError, match="out exists"):
        stage()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (output / "theirs").exists()


def test_half_an_old_checkpoint_never_comes_back(tmp_path, monkeypatch):
    """A conversion that died while it removed what it had replaced; then somebody deletes the new checkpoint."""
    output = tmp_path / "out"
    (output / "weights").mkdir(parents=True)
    (output / "config.json").touch()

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", stop)
        with pytest.raises(KeyboardInterrupt), staged_folder(output, overwrite=True) as staged:
            (staged / "config.json").touch()
    assert [p.name for p in tmp_path.iterdir() if ".old-" in p.name] == []
    shutil.rmtree(output)
    remove_stale(output)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_the_old_checkpoint_stays_if_the_last_rename_fails(tmp_path, monkeypatch, error):
    output, rename = tmp_path / "out", Path.rename
    output.mkdir()
    (output / "config.json").write_text("old")

    def fail(self, target):
        if target == output and ".tmp-" in self.name:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(type(error)), staged_folder(output, overwrite=True) as staged:
        (staged / "config.json").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (output / "config.json").read_text() == "old"


def test_one_of_two_replacements_at_once_wins_and_the_other_says_so(tmp_path, monkeypatch):
    output, rename = tmp_path / "out", Path.rename
    output.mkdir()
    (output / "config.json").write_text("old")

    def rename_late(self, target):
        if target == output:
            output.mkdir()
            (output / "config.json").write_text("theirs")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_late)
    with pytest.raises(FileExistsError, match="written by another process"), staged_folder(output, True) as staged:
        (staged / "config.json").write_text("ours")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (output / "config.json").read_text() == "theirs"


def test_two_threads_of_a_process_do_not_share_a_staged_folder(tmp_path):
    output = tmp_path / "out"
    with staged_folder(output) as staged:
        (staged / "config.json").touch()
        remove_stale(output)
        with pytest.raises(FileExistsError, match="another thread"), staged_folder(output):
            pass
        assert (staged / "config.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_files_of_dead_writers_are_removed_by_the_next(tmp_path):
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    file = tmp_path / "report.md"
    stale = tmp_path / f"report.md.tmp-{finished.pid}-1234"
    others = [tmp_path / f"report.md.tmp-{os.getppid()}-1234", tmp_path / f"report.mdx.tmp-{finished.pid}-1"]
    for path in (stale, *others):
        path.touch()
    with staged_file(file) as staged:
        staged.write_text("whole")
        remove_stale(file)
        assert not file.exists()
    assert file.read_text() == "whole"
    assert sorted(tmp_path.iterdir()) == sorted([file, *others])


def test_a_file_that_could_not_be_written_leaves_the_old_one(tmp_path):
    file = tmp_path / "report.md"
    file.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "half of it \ud800")
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_text() == "old"
