"""`semtoken export`: the plain model of a checkpoint, for engines that run no remote code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..conversion.plain import export_plain
from .main import CONTEXT
from .options import Json, Quiet
from .output import bars, console, ending_well, only_json

app = typer.Typer(rich_markup_mode="markdown", add_completion=False)


@app.command(context_settings=CONTEXT)
def export(
    checkpoint: Annotated[str, typer.Argument(help="SemToken folder or Hub id")],
    output_dir: Annotated[Path, typer.Argument(help="the new folder")],
    revision: Annotated[str | None, typer.Option("--revision", help="of the checkpoint on the Hub")] = None,
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", help="largest weight file")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a checkpoint in OUTPUT_DIR")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the plain model of a checkpoint: its weights bit for bit, its tokenizer, and no code.

    vLLM and other engines run it, over prompts that `semtoken serve` or the vLLM plugin compress.

    **Examples**

        semtoken export my-semtoken my-plain
        semtoken export me/llama-3.2-1b-semtoken my-plain --revision adapted

    **Exit codes**: 0 written; 1 the checkpoint cannot be read or the folder exists; 2 wrong usage; 130 Ctrl-C.
    """
    with ending_well(), only_json(as_json) as answer, bars(quiet):
        folder = export_plain(
            checkpoint,
            output_dir,
            revision=revision,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            progress=not quiet,
        )
        answer({"folder": str(folder)})
        if not as_json:
            console().print(f"the plain model: {folder}")
