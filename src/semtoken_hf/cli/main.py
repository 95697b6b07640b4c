"""`semtoken COMMAND`: commands are found by name and imported one at a time, so that help does not wait for PyTorch."""

from __future__ import annotations

import importlib
from typing import Any

import typer
from typer.core import TyperGroup

# Module in this package, and what the list of commands says; each defines `app`, a Typer with one command.
COMMANDS = {
    "inspect": ("inspect", "see what a checkpoint merges in a text: in the terminal and as a page"),
}
# Of every command: options may be written with dashes, too, as Transformers' own may.
CONTEXT = {"token_normalize_func": lambda name: name.replace("-", "_")}


class LazyGroup(TyperGroup):
    """Imports the module of a command when it is run or explained."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f".{COMMANDS[cmd_name][0]}", __package__)
        return typer.main.get_command(module.app)


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, rich_markup_mode="markdown", add_completion=False)


@app.callback()
def semtoken() -> None:
    """A Llama that reads long prompts in fewer positions: convert, use, inspect, adapt, measure and publish one."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    Raises:
        SystemExit: with the exit code (see `output`).
    """
    app(arguments, prog_name="semtoken")
