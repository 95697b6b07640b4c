#!/usr/bin/env python
"""Convert a plain checkpoint (Llama, Mistral, Qwen3, GPT-NeoX) and an encoder into one SemToken folder.

    python scripts/convert.py meta-llama/Llama-3.2-1B sentence-transformers/all-MiniLM-L6-v2 llama-3.2-1b-semtoken
    python scripts/convert.py llama encoder out --set target_ratio=4 segmentation_mode=greedy --protect_digits
    python scripts/convert.py llama encoder out --encoder_kind static --static_dim 64      # small models, CPUs
    python scripts/convert.py llama encoder out --encoder_layers 3                         # half the encoder's cost
    python scripts/convert.py llama none out --set segmentation_mode=uniform               # no encoder

The folder then loads with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from semtoken_hf.configuration_semtoken import ENCODER_DTYPES
from semtoken_hf.conversion.checkpoint import ENCODER_KINDS, convert_checkpoint


def parse_field(text: str) -> tuple[str, Any]:
    """`name=value`, the value as JSON where it is JSON and as a string otherwise."""
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"expected FIELD=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a plain checkpoint (safetensors, tokenizer.json)")
    parser.add_argument("encoder", help="folder or Hub id of a transformer encoder (BERT, MiniLM, ...), or 'none'")
    parser.add_argument("output_dir", help="the new folder")
    parser.add_argument(
        "--encoder_kind",
        choices=ENCODER_KINDS,
        default="transformer",
        help="keep the encoder's layers (default), or distil it to a table of one vector per token",
    )
    parser.add_argument("--encoder_layers", type=int, help="keep the encoder's first layers only (default all)")
    parser.add_argument(
        "--encoder_dtype", choices=ENCODER_DTYPES, default="bfloat16", help="of the encoder's layers (default bfloat16)"
    )
    parser.add_argument("--static_dim", type=int, default=64, help="length of the table's vectors (default 64)")
    parser.add_argument("--protect_digits", action="store_true", help="tokens with a digit never merge")
    parser.add_argument(
        "--protect_rare", type=float, default=0.0, metavar="SHARE", help="rarest share of the vocabulary, never merges"
    )
    parser.add_argument("--revision", help="revision of the model on the Hub")
    parser.add_argument("--trust_remote_code", action="store_true", help="for the encoder's tokenizer")
    parser.add_argument("--allow_pickle", action="store_true", help="read tensors from pytorch_model.bin; no code runs")
    parser.add_argument("--max_shard_size", default="5GB", help="largest weight file (default 5GB)")
    parser.add_argument("--overwrite", action="store_true", help="replace output_dir, at the very end")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument(
        "--set",
        dest="fields",
        nargs="+",
        action="extend",
        type=parse_field,
        default=[],
        metavar="FIELD=VALUE",
        help="compression fields of the configuration, such as target_ratio=4",
    )
    return parser


def main() -> None:
    parser = build_parser()
    options = vars(parser.parse_args())
    fields, quiet = dict(options.pop("fields")), options.pop("quiet")
    if taken := sorted(fields.keys() & options.keys()):
        parser.error(f"{taken} are options of their own, not configuration fields")
    if options["encoder"].lower() == "none":
        options["encoder"] = None
    try:
        print(convert_checkpoint(**options, **fields, progress=not quiet))
    except (FileExistsError, FileNotFoundError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
