import json
import shutil
from dataclasses import asdict

import pytest

from semtoken_hf.evaluation.configuration import EvaluationConfig, checkpoint_stamp
from semtoken_hf.evaluation.option_names import DataclassParser
from tests.fixtures.evaluation_data import write_checkpoint, write_data


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fraction": 0}, r"--fraction must be in \(0, 1\], got 0"),
        ({"ratios": [2.0, 0.5]}, "at least 1 token per slot, got 0.5"),
        ({"workers": 0}, "--workers must be at least 1, got 0"),
        ({"tasks": ["needle", "sudoku"]}, r"--tasks does not know \['sudoku'\]; it knows .*'wikitext'"),
        ({"sources": ["wikitext"]}, r"--sources takes NAME=VALUE, got \['wikitext'\]"),
        ({"sources": ["sudoku=file"]}, r"no task \['sudoku'\]; there are .*'wikitext'"),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        EvaluationConfig("tiny", **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"fraction": 0.5},
        {"sources": ["wikitext=other.txt"]},
        {"task_fractions": ["needle=0.5"]},
        {"checkpoints": ["other=elsewhere"]},
    ],
)
def test_another_folder_for_what_changes_the_figures(checkpoint, fields):
    assert EvaluationConfig(str(checkpoint), **fields).folder != EvaluationConfig(str(checkpoint)).folder


@pytest.mark.parametrize(
    "fields",
    [
        {"ratios": [3.0]},
        {"report": True},
    ],
)
def test_the_same_folder_for_what_only_adds_to_it(checkpoint, fields):
    config, usual = EvaluationConfig(str(checkpoint), **fields), EvaluationConfig(str(checkpoint))
    assert config.folder == usual.folder
    assert usual.folder.name.startswith("tiny__1792+256__fraction1__seed0__")
    assert EvaluationConfig(str(checkpoint), output_dir="there").folder.parts == ("there", usual.folder.name)


def test_a_checkpoint_has_a_stamp_of_its_weights(checkpoint, tmp_path):
    stamp = checkpoint_stamp(str(checkpoint))
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    assert checkpoint_stamp(str(copy)) == stamp
    (copy / "notes.md").write_text("no weight")
    assert checkpoint_stamp(str(copy)) == stamp
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"query_weight": 0.5}))
    assert checkpoint_stamp(str(copy)) != stamp
    assert checkpoint_stamp(str(write_checkpoint(tmp_path / "other", seed=1))) != stamp
    assert checkpoint_stamp("owner/on-the-hub") == "owner/on-the-hub"


def test_other_data_has_another_folder(tmp_path):
    one, other = write_data(tmp_path / "one"), write_data(tmp_path / "other", repeat=2)
    folders = {EvaluationConfig("tiny", data_dir=str(folder)).folder for folder in (one, other)}
    assert len(folders) == 2


def test_sources_come_from_the_data_folder_or_by_name(tmp_path):
    data = write_data(tmp_path / "data")
    config = EvaluationConfig("tiny", data_dir=str(data), sources=["hotpotqa=owner/hub", "needle=x=y"])
    assert config.source("hotpotqa") == "owner/hub"
    assert config.source("needle") == "x=y"
    assert config.source("musique") == str(data / "musique.jsonl.xz")
    assert config.source("chartqa") == str(data / "chartqa")
    (data / "musique.jsonl.xz").unlink()
    assert config.source("musique") is None


def test_settings_of_a_task_are_those_of_the_configuration(tmp_path):
    data = write_data(tmp_path / "data")
    config = EvaluationConfig(
        "tiny", data_dir=str(data), fraction=0.5, task_fractions=["needle=0.1"], max_new_tokens=7, seed=3
    )
    needle, hotpotqa = config.settings("needle", 99), config.settings("hotpotqa", 99)
    assert (needle.fraction, hotpotqa.fraction) == (pytest.approx(0.05), 0.5)
    assert (needle.limit, needle.max_new_tokens, needle.seed) == (99, 7, 3)
    assert (needle.source, hotpotqa.source) == (None, str(data / "hotpotqa.jsonl.xz"))
    assert needle.haystack == str(data / "wikitext-103" / "test.txt")
    assert EvaluationConfig("tiny", data_dir=str(data), haystack="h.txt").settings("needle", 1).haystack == "h.txt"


def test_the_command_line_has_every_field(tmp_path):
    arguments = (
        "--checkpoint tiny --tasks needle tables --ratios 2 3.5 --sources needle=a qmsum=b --lengths 64 --report"
    )
    (config,) = DataclassParser(EvaluationConfig).parse_args_into_dataclasses(arguments.split())
    assert (config.tasks, config.ratios, config.lengths) == (["needle", "tables"], [2.0, 3.5], [64])
    assert (config.source_of, config.report) == ({"needle": "a", "qmsum": "b"}, True)
    config.output_dir = str(tmp_path)
    config.save()
    assert json.loads((config.folder / "config.json").read_text()) == asdict(config)
