from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from semtoken_hf import SemTokenLlamaForCausalLM, convert_checkpoint
from semtoken_hf.conversion.staging import check_output, remove_stale, staged_folder
from semtoken_hf.evaluation.files import write_text


def test_killed_between_the_two_renames_the_old_checkpoint_comes_back(make_llama, encoder_folder, tmp_path):
    """The old one is moved aside, the new one is not there yet, and the process is gone."""
    source, output = make_llama(), tmp_path / "out"
    convert_checkpoint(source, encoder_folder, output, progress=False, target_ratio=3)
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    output.rename(tmp_path / f"out.old-{finished.pid}")
    (tmp_path / f"out.tmp-{finished.pid}").mkdir()
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


def test_the_old_checkpoint_stays_if_the_last_rename_fails(tmp_path, monkeypatch):
    output, rename = tmp_path / "out", Path.rename
    output.mkdir()
    (output / "config.json").write_text("old")

    def fail(self, target):
        if target == output and ".tmp-" in self.name:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="No space"), staged_folder(output, overwrite=True) as staged:
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


def test_a_file_that_could_not_be_written_leaves_the_old_one(tmp_path):
    file = tmp_path / "report.md"
    file.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "half of it \ud800")
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_text() == "old"
