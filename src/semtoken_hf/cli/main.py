"""`semtoken COMMAND`: commands are found by name and imported one at a time, so that help does not wait for them."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ..evaluation.option_names import dashed
from .output import ending_well

MAKE, USE, MEASURE, PUBLISH = "Make a checkpoint", "Use and see it", "Measure it", "Publish it"
# Module in this package, panel of the help, and what the list of commands says; each module defines `app`, a Typer with
# one command.
COMMANDS = {
    "convert": ("convert", MAKE, "turn a plain checkpoint and an encoder into one SemToken folder"),
    "adapt": ("adapt", MAKE, "teach a converted checkpoint to read merged slots, by distillation"),
    "export": ("export", MAKE, "write the plain model of a checkpoint, for inference engines"),
    "generate": ("generate", USE, "read a prompt and write on, as it comes"),
    "inspect": ("inspect", USE, "see what a checkpoint merges in a text: in the terminal and as a page"),
    "doctor": ("doctor", USE, "what is installed, which attention will run, whether a checkpoint is whole"),
    "serve": ("serve", USE, "compress prompts on their way to vLLM: an OpenAI-compatible proxy"),
    "compress-dataset": ("compress_dataset", USE, "turn a data set into prefixes or prompt embeddings, offline"),
    "evaluate": ("evaluate", MEASURE, "quality, memory and time of a checkpoint beside its baselines, as a report"),
    "lm-eval": ("lm_eval", MEASURE, "any task of lm-eval, with compressed contexts (--model semtoken)"),
    "benchmark": ("benchmark", MEASURE, "time and memory of reading a prompt, beside plain Llama"),
    "push": ("push", PUBLISH, "send a checkpoint to the Hub, in one commit"),
}
# Of every command: options of earlier releases, with underscores, are read, too.
CONTEXT: dict[Any, Any] = {
    "token_normalize_func": dashed,
    "help_option_names": ["--help", "-h"],
}


class LazyGroup(TyperGroup):
    """Imports the module of a command when it is run or explained."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """What the list needs to know of a command: `resolve_command` brings the command itself."""
        if cmd_name not in COMMANDS:
            return None
        _, panel, text = COMMANDS[cmd_name]
        return TyperCommand(cmd_name, help=text, rich_help_panel=panel)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        self.commands = {name: self.get_command(ctx, name) for name in COMMANDS}  # for its suggestions
        name, command, rest = super().resolve_command(ctx, [self._known_as(args[0]), *args[1:]])
        if name is None or command is None:
            return name, command, rest
        module = importlib.import_module(f".{COMMANDS[name][0]}", __package__)
        return name, typer.main.get_command(module.app), rest

    def _known_as(self, name: str) -> str:
        """`lm_eval` is `lm-eval`."""
        return dashed(name) if dashed(name) in COMMANDS else name


app = typer.Typer(
    cls=LazyGroup, no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False, name="semtoken"
)


def _show_version(wanted: bool) -> None:
    if wanted:
        try:
            print(f"semtoken-hf {version('semtoken-hf')}")
        except PackageNotFoundError:
            print("semtoken-hf, not installed")
        raise typer.Exit


@app.callback(context_settings={"help_option_names": CONTEXT["help_option_names"]})
def semtoken(
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="print the version and end")
    ] = False,
) -> None:
    """A Llama that reads long prompts in fewer positions: convert, use, inspect, adapt, measure and publish one.

    **Examples**

        semtoken convert meta-llama/Llama-3.2-1B sentence-transformers/all-MiniLM-L6-v2 my-semtoken
        semtoken generate my-semtoken --file chapter.txt --question "Who knocked at the door?"
        semtoken doctor my-semtoken

    Every command but `lm-eval` takes `--json`: one JSON object on standard output, everything else on standard error.

    **Exit codes**: 0 done; 1 it could not be done, one line says why; 2 wrong usage; 3 `doctor` found a fault;
    130 Ctrl-C; 143 terminated. `SEMTOKEN_TRACEBACK=1` shows where an error comes from.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    Raises:
        SystemExit: with the exit code (see `output`), unless it is 0.
    """
    try:
        with ending_well():
            app(arguments, prog_name="semtoken")
    except SystemExit as end:
        if end.code:
            raise
