"""The command itself: help, examples that parse, names of commands and options, versions."""

from __future__ import annotations

import re
import shlex
import sys

import pytest
import typer
from typer.testing import CliRunner

from semtoken_hf.cli.adapt import read_training_options
from semtoken_hf.cli.main import COMMANDS, app
from semtoken_hf.evaluation.tasks import TASKS
from tests.fixtures.command_line import run_command

UNDERSCORED = r"--\w+_"
GROUP = typer.main.get_command(app)


def command_of(name: str):
    context = GROUP.make_context("semtoken", [name], resilient_parsing=True)
    return GROUP.resolve_command(context, [name])[1]


def examples_of(name: str) -> list[list[str]]:
    """Arguments of the commands that the help of `semtoken NAME` shows."""
    lines = [line.strip() for line in command_of(name).help.splitlines() if line.startswith("    ")]
    words = [shlex.split(line.split(" < ")[0]) for line in lines if "semtoken" in line]
    return [w[w.index("semtoken_hf" if "-m" in w else "semtoken") + 1 :] for w in words if name in w]


def test_the_list_of_commands_imports_none_of_them(monkeypatch):
    modules = [f"semtoken_hf.cli.{module}" for module, _, _ in COMMANDS.values()]
    for module in modules:
        monkeypatch.delitem(sys.modules, module, raising=False)
    shown = " ".join(run_command("--help").stdout.replace("│", " ").split())
    for name, (_, panel, text) in COMMANDS.items():
        assert f"{name} {text}" in shown
        assert panel in shown
    assert not [module for module in modules if module in sys.modules]
    run_command("push", "--help")
    assert [module for module in modules if module in sys.modules] == ["semtoken_hf.cli.push"]


def test_without_arguments_it_is_the_help():
    shown = {run_command(*arguments, code=2 * (not arguments)).stdout.strip() for arguments in ([], ["--help"], ["-h"])}
    assert len(shown) == 1


def test_the_version():
    assert run_command("--version").stdout.startswith("semtoken-hf")


@pytest.mark.parametrize(("typo", "meant"), [("evaluat", "evaluate"), ("covert", "convert"), ("docter", "doctor")])
def test_an_unknown_command_suggests_the_nearest(typo, meant):
    done = run_command(typo, code=2)
    assert f"No such command '{typo}'. Did you mean '{meant}'?" in done.stderr
    assert done.stdout == ""


def test_an_unknown_option_suggests_the_nearest():
    assert "--fraction" in run_command("evaluate", "--checkpoint", "x", "--fractoin", "1", code=2).stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_that_parse(name):
    shown = run_command(name, "--help").stdout
    if name != "lm-eval":  # lm-eval's own
        assert "Examples" in shown
        assert "--json" in shown
        assert "Exit codes" in shown
    examples = examples_of(name)
    assert examples
    for example in examples:
        assert example[0] == name
        command = command_of(name)
        context = command.make_context(name, example[1:])
        if name == "adapt":
            read_training_options(context.args)
        elif name != "lm-eval":
            assert context.args == []


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "lm-eval"])  # lm-eval's own
def test_options_are_shown_with_dashes(name):
    command = command_of(name)
    names = [option for param in command.params for option in (*param.opts, *param.secondary_opts)]
    assert not [option for option in names if re.match(UNDERSCORED, option)]
    assert not re.search(UNDERSCORED, run_command(name, "--help").stdout)


def test_names_may_have_dashes_or_underscores():
    for name in ("lm-eval", "lm_eval"):
        assert "--model semtoken" in run_command(name).stdout
    for option in ("--dry-run", "--dry_run"):
        context = command_of("push").make_context("push", ["folder", "me/x", option])
        assert context.params["dry_run"] is True


def test_evaluate_lists_the_tasks_and_their_files():
    shown = run_command("evaluate", "--help").stdout
    for name, task in TASKS.items():
        (line,) = [line for line in shown.splitlines() if line.strip().startswith(f"{name} ")]
        assert (task.file or "(made here)") in line


def test_adapt_lists_the_options_of_the_training():
    shown = run_command("adapt", "--help-training").stdout
    assert "--gradient-accumulation-steps" in shown
    assert not re.search(UNDERSCORED, shown)


def test_the_shell_completes_commands_and_options(monkeypatch):
    monkeypatch.setenv("_SEMTOKEN_COMPLETE", "complete_bash")
    for line, wanted in (("semtoken ", set(COMMANDS)), ("semtoken push --dr", {"--dry-run"})):
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
        done = CliRunner().invoke(app, [], prog_name="semtoken")
        assert set(done.stdout.split()) == wanted
