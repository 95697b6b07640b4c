"""`semtoken doctor`: what is installed, which attention will run, and whether a checkpoint is whole."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..conversion.upgrade import upgrade_checkpoint
from .diagnosis.attention import Shape, check_attention, shape_of
from .diagnosis.checkpoint import check_checkpoint, folder_of
from .diagnosis.checks import Check
from .diagnosis.installation import check_device, check_installation
from .main import CONTEXT
from .options import Json
from .output import FAULT_FOUND, bars, console, ending_well, only_json

STYLES = {"ok": "green", "warning": "yellow", "fault": "bold red", "absent": "dim"}

app = typer.Typer(rich_markup_mode="markdown", add_completion=False)


@app.command(context_settings=CONTEXT)
def doctor(
    checkpoint: Annotated[str | None, typer.Argument(help="SemToken folder, or a Hub id that was downloaded")] = None,
    upgrade: Annotated[
        bool, typer.Option("--upgrade", help="first rewrite the folder in place: today's fields and modules")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what is installed, which kernels attention will run on this machine and why, and what is wrong.

    With a checkpoint: whether every file, tensor and module is there and of the right kind, whether tokenizer, encoder
    and adapter fit, and whether its modules are those of this version. Nothing of it is run, nothing is downloaded.
    `--upgrade` rewrites a folder of an earlier version first, whole or not at all; its weights stay.

    **Examples**

        semtoken doctor
        semtoken doctor my-semtoken
        semtoken doctor model_cards/semtoken-llama-tiny --json
        semtoken doctor my-old-semtoken --upgrade

    **Exit codes**: 0 all is well, warnings aside; 1 there is no such checkpoint; 2 wrong usage; 3 a fault was found.
    """
    with ending_well(), only_json(as_json) as answer, bars(quiet=True):
        if upgrade:
            if checkpoint is None:
                raise typer.BadParameter("--upgrade needs the folder of a checkpoint")
            upgrade_checkpoint(checkpoint)
        checks, shape = [*check_installation(), *check_device()], Shape()
        of_checkpoint: list[Check] = []
        if checkpoint is not None:
            of_checkpoint, config = check_checkpoint(folder_of(checkpoint))
            shape = shape if config is None else shape_of(config)
        checks += [*check_attention(shape), *of_checkpoint]
        faults = sum(check.status == "fault" for check in checks)
        answer({"ok": not faults, "faults": faults, "checks": [asdict(check) for check in checks]})
        if not as_json:
            show_checks(checks, console())
    if faults:
        raise typer.Exit(FAULT_FOUND)


def show_checks(checks: list[Check], show: Console) -> None:
    """A table for each group, and a line that sums up."""
    for group in dict.fromkeys(check.group for check in checks):
        table = Table(title=group, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for title in ("", "what", "found", "what to do, or why"):
            table.add_column(title, overflow="fold")
        for check in checks:
            if check.group == group:
                mark = Text("-" if check.status == "absent" else check.status, STYLES[check.status])
                table.add_row(mark, check.name, check.found, check.advice)
        show.print(table, soft_wrap=False)
        show.print()
    count = {status: sum(check.status == status for check in checks) for status in ("fault", "warning")}
    named = [f"{number} {status}{'' if number == 1 else 's'}" for status, number in count.items() if number]
    show.print(", ".join(named) or "all is well", style="bold")
