"""`semtoken compress-dataset`: a folder or data set of documents becomes prefixes or prompt embeddings, offline."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..bulk import BulkOptions
from ..bulk import compress_dataset as compress
from ..bulk.engines import ENGINES
from ..bulk.settings import KINDS
from ..conversion.source import DTYPES
from .main import CONTEXT
from .options import Json, Quiet
from .output import bars, console, ending_well, only_json

app = typer.Typer(rich_markup_mode="markdown", add_completion=False)
TEXTS, WORK = "Documents", "Work"


@app.command(context_settings=CONTEXT)
def compress_dataset(
    checkpoint: Annotated[str, typer.Argument(help="SemToken folder or Hub id")],
    source: Annotated[
        str,
        typer.Argument(
            help="folder of .txt and .md files, a .jsonl or .jsonl.xz file, a folder of `save_to_disk`, or the id of a "
            "data set on the Hub"
        ),
    ],
    output: Annotated[Path, typer.Argument(help="folder of the shards, new or begun with the same options")],
    kind: Annotated[
        Literal[KINDS],  # type: ignore[valid-type]
        typer.Option("--kind", help="prefixes for `generate`, or prompt embeddings for vLLM"),
    ] = "prefixes",
    target_ratio: Annotated[
        float | None, typer.Option("--target-ratio", help="tokens per slot; the checkpoint's if unset")
    ] = None,
    dtype: Annotated[
        Literal[DTYPES] | None,  # type: ignore[valid-type]
        typer.Option("--dtype", help="that the model will be loaded in; the checkpoint's if unset"),
    ] = None,
    text_field: Annotated[
        str, typer.Option("--text-field", rich_help_panel=TEXTS, help="field of the text in a row")
    ] = "text",
    text_config: Annotated[
        str | None, typer.Option("--text-config", rich_help_panel=TEXTS, help="configuration of the data set")
    ] = None,
    text_split: Annotated[
        str, typer.Option("--text-split", rich_help_panel=TEXTS, help="split of the data set")
    ] = "train",
    shard_size: Annotated[
        int, typer.Option("--shard-size", min=1, rich_help_panel=WORK, help="documents in a file")
    ] = 64,
    workers: Annotated[int, typer.Option("--workers", min=1, rich_help_panel=WORK, help="processes")] = 1,
    engine: Annotated[
        Literal[tuple(ENGINES)],  # type: ignore[valid-type]
        typer.Option(
            "--engine", rich_help_panel=WORK, help="datasets: this machine; ray: the cluster that RAY_ADDRESS names"
        ),
    ] = "datasets",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compress every document of a data set once, into shards that are read by document id.

    `semtoken_hf.bulk.open_prefixes(OUTPUT, model)` gives prefixes to join and to ask questions about;
    `open_prompt_embeds(OUTPUT)` gives prompts for vLLM. Shards appear whole or not at all, and the same command goes on
    with those that are missing. Needs the extra `bulk`, and `ray` for its engine.

    **Examples**

        semtoken compress-dataset my-semtoken docs/ prefixes/
        semtoken compress-dataset my-semtoken articles.jsonl.xz prompts/ --kind prompt-embeds --target-ratio 4
        semtoken compress-dataset my-semtoken docs/ /shared/prefixes --engine ray --workers 64

    **Exit codes**: 0 every shard is there; 1 a document, the checkpoint or OUTPUT does not do; 2 wrong usage; 130
    Ctrl-C.
    """
    given: dict[str, Any] = locals()
    chosen = {field.name: given[field.name] for field in fields(BulkOptions)}
    resuming = "finished shards are kept: start the same command again to go on"
    with ending_well(resuming), only_json(as_json) as answer, bars(quiet):
        record = compress(BulkOptions(**chosen), output, engine=engine, workers=workers, progress=not quiet)
        answer(record)
        if not as_json:
            show_compressed(record)


def show_compressed(record: dict[str, Any]) -> None:
    """The record for people; the folder is the last line."""
    show = console()
    ratio = record["tokens"] / record["slots"]
    show.print(f"{record['documents']:,} documents in {record['shards']:,} shards, {record['written']:,} of them new")
    show.print(f"{record['tokens']:,} tokens, {record['slots']:,} slots, ratio {ratio:.2f}", style="dim")
    show.print(record["folder"], style="bold")
