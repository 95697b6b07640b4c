"""Options with dashes; the underscores of earlier releases are read and not shown."""

import re
from dataclasses import dataclass

import pytest

from semtoken_hf.evaluation.option_names import DataclassParser, with_dashes


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("--target_ratio 4", "--target-ratio 4"),
        ("--text_file=my_text.txt", "--text-file=my_text.txt"),
        ("--set recent_window=4 -a_b a_b", "--set recent_window=4 -a_b a_b"),
        ("--dry_run -- --dry_run", "--dry-run -- --dry_run"),
    ],
)
def test_names_alone_get_dashes(given, read):
    assert with_dashes(given.split()) == read.split()
    assert with_dashes(["--is_it so?"]) == ["--is_it so?"]


def test_a_parser_shows_dashes_and_reads_both():
    @dataclass
    class Config:
        text_file: str = ""
        keep_all: bool = True

    parser = DataclassParser(Config)
    assert not re.search(r"--\w+_", parser.format_help())
    for arguments in (["--text_file", "a_b", "--no_keep_all"], ["--text-file=a_b", "--no-keep-all"]):
        assert parser.parse_args_into_dataclasses(arguments) == (Config("a_b", False),)
