"""Options from dataclasses: each field once, lists in both forms, what the dataclass refuses is wrong usage."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import pytest
import typer
from typer.testing import CliRunner

from semtoken_hf.benchmarking.configuration import BenchmarkConfig
from semtoken_hf.cli import adapt, benchmark, evaluate, generate
from semtoken_hf.cli.dataclass_options import build, takes_fields
from semtoken_hf.cli.main import CONTEXT
from semtoken_hf.cli.options import SpreadingCommand
from semtoken_hf.evaluation.configuration import EvaluationConfig
from semtoken_hf.evaluation.option_names import dashed
from semtoken_hf.training.adaptation_arguments import AdaptationArguments


@dataclass
class Config:
    name: str = field(metadata={"help": "what it is called"})
    ratios: list[float] = field(default_factory=lambda: [2.4], metadata={"help": "tokens per slot"})
    words: list[str] = field(default_factory=list, metadata={"help": "some of: a, b"})
    pairs: list[str] = field(default_factory=list, metadata={"help": "NAME=VALUE, many"})
    size: int | None = None
    kind: str = field(default="a", metadata={"help": "one of two", "choices": ("a", "b")})
    cold: bool = False
    warm: bool = True

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ValueError(f"--size must be at least 1, got {self.size}")


def parse(*arguments: str, code: int = 0):
    """The configuration, or what is said on standard error."""
    app, found = typer.Typer(), []

    @app.command(cls=SpreadingCommand, context_settings=CONTEXT)
    @takes_fields(Config, {"Lists": ("ratios", "words")})
    def command(extra: bool = False, **given) -> None:
        """Collect."""
        found.append(build(Config, given))

    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == code, done.stderr
    return found[0] if found else done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        "--ratios 2 4 -1",
        "--ratios 2 --ratios 4 --ratios -1",
        "--ratios=2 --ratios 4 -1",
        "--ratios 2 4 --cold --ratios -1",
    ],
)
def test_lists_have_two_forms(arguments):
    config = parse("--name", "x", *arguments.split())
    assert config == Config("x", ratios=[2.0, 4.0, -1.0], cold="--cold" in arguments)


def test_a_list_ends_at_the_next_option_and_before_what_is_none_of_it():
    given = "--words a b --pairs p=1 q=2=3 --name x --words c --extra"
    assert parse(*given.split()) == Config("x", words=["a", "b", "c"], pairs=["p=1", "q=2=3"])
    assert "unexpected extra argument" in parse("--name", "x", "--pairs", "p=1", "q", code=2)
    assert "unexpected extra argument" in parse("--name", "x", "--ratios", "1", "q", code=2)
    assert "Invalid value for '--ratios'" in parse("--name", "x", "--ratios", "q", code=2)
    assert "requires an argument" in parse("--name", "x", "--ratios", code=2)


def test_flags_may_have_a_value():
    assert parse("--name", "x", "--cold", "true", "--warm", "False") == Config("x", cold=True, warm=False)
    assert parse("--name", "x", "--cold", "no", "--warm", "yes") == Config("x")
    assert parse("--name", "x", "--cold", "--no-warm") == Config("x", cold=True, warm=False)


def test_flags_have_none_where_there_are_arguments():
    command = typer.main.get_command(generate.app)
    assert command.make_context("generate", ["folder", "--plain", "yes"]).params["prompt"] == "yes"


def test_what_is_not_given_is_left_to_the_dataclass():
    assert parse("--name", "x") == Config("x")
    assert "Missing option" in parse(code=2)


def test_what_the_dataclass_refuses_is_one_line():
    assert parse("--name", "x", "--size", "0", code=2) == "error: --size must be at least 1, got 0\n"
    assert "'c'" in parse("--name", "x", "--kind", "c", code=2)


def test_values_that_look_like_options_belong_to_their_option():
    assert parse("--name", "--cold") == Config("--cold")


@pytest.mark.parametrize(
    ("module", "of"), [(evaluate, EvaluationConfig), (benchmark, BenchmarkConfig), (adapt, AdaptationArguments)]
)
def test_every_field_is_an_option_with_its_help(module, of):
    command = typer.main.get_command(module.app)
    options = {param.name: param for param in command.params}
    for known in fields(of):
        assert options[known.name].opts == [dashed(f"--{known.name}")]
        assert options[known.name].help.startswith(known.metadata.get("help", ""))
    panels = [name for names in module.PANELS.values() for name in names]
    assert len(panels) == len(set(panels))
    assert set(panels) <= {known.name for known in fields(of)}
