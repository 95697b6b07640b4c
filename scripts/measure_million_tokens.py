#!/usr/bin/env python
"""One million tokens on a processor: prompts of growing length through a tiny random Llama, read in chunks of slots.

    python scripts/measure_million_tokens.py --output model_cards/semtoken-llama-tiny/million_tokens.md

Every reading is a process of its own, so that none finds memory of another. Time, slots, bytes of the cache and the
most memory beyond the model, by length: what grows, and how fast.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from semtoken_hf.benchmarking.shapes import SHAPES
from semtoken_hf.evaluation.files import write_text
from semtoken_hf.evaluation.option_names import DashedParser
from semtoken_hf.evaluation.provenance import provenance, publish_report
from semtoken_hf.gpu_suite.models import build_model
from semtoken_hf.gpu_suite.parts import TimeUp
from semtoken_hf.gpu_suite.streaming import stream_prompt
from semtoken_hf.varlen_semtoken import VARLEN

LENGTHS = tuple(2**i for i in range(16, 21))
COLUMNS = {
    "variant": "{}",
    "tokens": "{:,}",
    "slots": "{:,}",
    "stage s": "{:.2f}",
    "prefill s": "{:.1f}",
    "decode ms": "{:.1f}",
    "KV bytes": "{:,}",
    "peak bytes": "{:,}",
    "peak beyond the cache": "{:,}",
}


def parse_arguments() -> argparse.Namespace:
    parser = DashedParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="tiny")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="prompt tokens")
    parser.add_argument("--ratio", type=float, default=2.4, help="tokens per slot")
    parser.add_argument("--chunk", type=int, default=512, help="slots that the layers read at a time")
    parser.add_argument("--attention", default=VARLEN, help="attn_implementation (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--plain-seconds", type=float, default=600, help="plain readings end after this; 0: none")
    parser.add_argument("--seconds", type=float, default=3600, help="readings with SemToken end after this")
    parser.add_argument("--output", type=Path, help="Markdown file to write, with JSON beside it")
    parser.add_argument("--reading", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


@torch.no_grad()
def read_once(arguments: argparse.Namespace, length: int, is_plain: bool) -> dict[str, Any]:
    """One reading in this process; its record, or `over` where it took too long."""
    shape, chunk = SHAPES[arguments.shape], arguments.chunk
    model = build_model(shape, dtype=torch.float32, attn_implementation=arguments.attention)
    stream_prompt(model, min(length, 2048), chunk, time.time() + 600, arguments.ratio)  # to warm up
    limit = arguments.plain_seconds if is_plain else arguments.seconds
    ratio = None if is_plain else arguments.ratio
    try:
        return stream_prompt(model, length, chunk, time.time() + limit, ratio, arguments.new_tokens)
    except TimeUp:
        return {"variant": "plain" if is_plain else "SemToken", "tokens": length, "over": limit}


def read_in_child(variant: str, length: int) -> dict[str, Any]:
    """`read_once` in another process with the same options."""
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--reading", variant, str(length)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Records of all readings; once a variant takes too long, longer prompts are left out. Saved after each."""
    records: list[dict[str, Any]] = []
    for variant, limit in (("SemToken", arguments.seconds), ("plain", arguments.plain_seconds)):
        for length in sorted(arguments.lengths) if limit > 0 else ():
            records.append(read_in_child(variant, length))
            print(records[-1], file=sys.stderr)
            save(arguments, records)
            if "over" in records[-1]:
                break
    return records


def save(arguments: argparse.Namespace, records: list[dict[str, Any]]) -> None:
    if arguments.output:
        content = {"provenance": provenance(), "shape": arguments.shape, "chunk": arguments.chunk, "records": records}
        write_text(arguments.output.with_suffix(".json"), json.dumps(content, indent=1))


def table(records: list[dict[str, Any]]) -> list[str]:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for record in records:
        if "over" in record:
            lines.append(f"| {record['variant']} | {record['tokens']:,} | over {record['over']:.0f} s |" + " |" * 6)
            continue
        values = [(record[name], form) for name, form in COLUMNS.items()]
        lines.append("| " + " | ".join("" if v is None else form.format(v) for v, form in values) + " |")
    return lines


def main() -> None:
    arguments = parse_arguments()
    if arguments.reading:
        variant, length = arguments.reading
        print(json.dumps(read_once(arguments, int(length), variant == "plain")))
        return
    shape = SHAPES[arguments.shape]
    lines = [
        "# One million tokens",
        "",
        f"Shape `{arguments.shape}` ({shape.num_hidden_layers} layers of width {shape.hidden_size}, float32), random "
        "weights, a chapter of text repeated, the static encoder of the embedded checkpoint, attention "
        f"{arguments.attention}; the layers "
        f"read {arguments.chunk} slots at a time, then {arguments.new_tokens} tokens are generated. Stage: the "
        "compression alone. Peak bytes: the most that the process held beyond the loaded model, and less the cache.",
        "",
        *table(measure(arguments)),
    ]
    publish_report(lines, arguments.output)


if __name__ == "__main__":
    main()
