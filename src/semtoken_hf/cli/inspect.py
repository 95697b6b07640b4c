"""`semtoken inspect`: see what a checkpoint merges in a text."""

from __future__ import annotations

from typing import Annotated

import typer

from .main import CONTEXT
from .output import ending_well

app = typer.Typer(rich_markup_mode="markdown", add_completion=False)


@app.command(context_settings=CONTEXT)
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="SemToken folder or Hub id")],
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of text")] = False,
) -> None:
    """See what a checkpoint merges in a text.

    **Examples**

        semtoken inspect my-semtoken chapter.txt
    """
    with ending_well():
        raise NotImplementedError
