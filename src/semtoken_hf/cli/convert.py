"""`semtoken convert`: a plain checkpoint and an encoder become one SemToken folder."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..configuration_semtoken import ENCODER_DTYPES
from ..conversion.checkpoint import ENCODER_KINDS, convert_checkpoint
from ..conversion.source import DTYPES
from ..conversion.weights import find_tensors
from .main import CONTEXT
from .options import Fields, Json, Quiet, SpreadingCommand, fields_of
from .output import USAGE, bars, console, ending_well, fail, only_json
from .texts import compression_fields, size_text

ENCODER, PROTECTION, FILES = "Encoder", "What never merges", "Files"

app = typer.Typer(rich_markup_mode="markdown", add_completion=False)


@app.command(cls=SpreadingCommand, context_settings=CONTEXT)
def convert(
    model: Annotated[
        str, typer.Argument(help="folder or Hub id of a plain checkpoint or a LoRA adapter, or a GGUF file")
    ],
    encoder: Annotated[
        str, typer.Argument(help="folder or Hub id of a transformer encoder (BERT, MiniLM, ...), or none")
    ],
    output_dir: Annotated[Path, typer.Argument(help="the new folder")],
    fields: Fields = None,
    encoder_kind: Annotated[
        Literal[ENCODER_KINDS],  # type: ignore[valid-type]
        typer.Option(
            "--encoder-kind",
            rich_help_panel=ENCODER,
            help="keep the encoder's layers, or distil it to a table of one vector per token",
        ),
    ] = "transformer",
    encoder_layers: Annotated[
        int | None,
        typer.Option("--encoder-layers", rich_help_panel=ENCODER, help="keep its first layers only; all if unset"),
    ] = None,
    encoder_dtype: Annotated[
        Literal[ENCODER_DTYPES],  # type: ignore[valid-type]
        typer.Option(
            "--encoder-dtype", rich_help_panel=ENCODER, help="of its layers; auto: bfloat16 where the device has it"
        ),
    ] = "auto",
    static_dim: Annotated[
        int, typer.Option("--static-dim", rich_help_panel=ENCODER, help="length of the table's vectors")
    ] = 64,
    protect_digits: Annotated[
        bool, typer.Option("--protect-digits", rich_help_panel=PROTECTION, help="tokens with a digit never merge")
    ] = False,
    protect_rare: Annotated[
        float,
        typer.Option("--protect-rare", rich_help_panel=PROTECTION, metavar="SHARE", help="of the vocabulary, rarest"),
    ] = 0.0,
    revision: Annotated[
        str | None, typer.Option("--revision", rich_help_panel=FILES, help="revision of the model on the Hub")
    ] = None,
    gguf_file: Annotated[
        str | None,
        typer.Option("--gguf-file", rich_help_panel=FILES, help="which GGUF file of the folder or repository MODEL"),
    ] = None,
    dtype: Annotated[
        Literal[DTYPES] | None,  # type: ignore[valid-type]
        typer.Option(
            "--dtype",
            rich_help_panel=FILES,
            help="of the weights of a GGUF file (unset: float32) or of a merged adapter (unset: its base model's)",
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", rich_help_panel=FILES, help="for the encoder's tokenizer")
    ] = False,
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle",
            rich_help_panel=FILES,
            help="read the model's pickle weights (.bin) where it has no safetensors; only of a source you trust",
        ),
    ] = False,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", rich_help_panel=FILES, help="largest weight file")
    ] = "5GB",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", rich_help_panel=FILES, help="replace OUTPUT_DIR, at the very end")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn a plain checkpoint (of a family in docs/compatibility.md) and an encoder into one SemToken folder.

    The weights are copied shard by shard and unchanged; a GGUF file is dequantised, an adapter merged first. The folder
    carries its own code and loads with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`. It
    appears whole or not at all.

    **Examples**

        semtoken convert meta-llama/Llama-3.2-1B sentence-transformers/all-MiniLM-L6-v2 my-semtoken
        semtoken convert llama encoder my-semtoken --set target_ratio=4 recent_window=128 --protect-digits
        semtoken convert llama encoder my-semtoken --encoder-kind static --static-dim 64
        semtoken convert llama none my-semtoken --set segmentation_mode=uniform
        semtoken convert model.Q4_K_M.gguf encoder my-semtoken --dtype bfloat16
        semtoken convert my-lora encoder my-semtoken

    **Exit codes**: 0 converted; 1 the model, the encoder or a field does not do; 2 wrong usage; 130 Ctrl-C.
    """
    options = {name: value for name, value in locals().items() if name not in ("fields", "as_json", "quiet")}
    with ending_well("no folder was written; start again"), only_json(as_json) as answer, bars(quiet):
        given = fields_of(fields)
        if taken := sorted(given.keys() & inspect.signature(convert_checkpoint).parameters.keys()):
            fail(f"{taken} are options of their own, not configuration fields", USAGE)
        if encoder.lower() == "none":
            options["encoder"] = None
        if output_dir.exists() and not overwrite:
            raise FileExistsError(f"{output_dir} exists; choose another folder or pass --overwrite")
        folder = convert_checkpoint(**options, **given, progress=not quiet)
        record = describe(folder)
        answer(record)
        if not as_json:
            show_converted(record)


def describe(folder: Path) -> dict[str, Any]:
    """What a converted folder holds: files and bytes, tensors, and the compression fields of its configuration."""
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {
        "folder": folder,
        "model_type": config["model_type"],
        "files": dict(sorted(files.items())),
        "bytes": sum(files.values()),
        "tensors": len(find_tensors(folder)),
        "fields": compression_fields(config),
    }


def show_converted(record: dict[str, Any]) -> None:
    """The record for people; the folder is the last line."""
    fields = ", ".join(f"{name} {value}" for name, value in record["fields"].items() if not isinstance(value, list))
    show = console()
    show.print(f"{record['model_type']}: {record['tensors']} tensors in {len(record['files'])} files, ", end="")
    show.print(size_text(record["bytes"]))
    show.print(fields, style="dim")
    show.print(str(record["folder"]), style="bold")
