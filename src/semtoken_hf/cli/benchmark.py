"""`semtoken benchmark`: time and memory of reading a prompt, beside plain Llama over n tokens and over m."""

from __future__ import annotations

import json
from typing import Any

import typer

from ..benchmarking.configuration import BenchmarkConfig
from .dataclass_options import build, takes_fields
from .main import CONTEXT
from .options import Json, Quiet, SpreadingCommand
from .output import bars, console, ending_well, only_json

PANELS = {
    "What is measured": ("shapes", "lengths", "ratios", "batches", "stage_only", "stage_lengths", "compile"),
    "Of which model": (
        *("checkpoint", "encoder", "encoder_kind", "encoder_layers", "overrides"),
        *("dtype", "device", "attn_implementation"),
    ),
    "How": ("text_file", "prefill_chunk_size", "new_tokens", "repetitions", "max_seconds"),
}
# Files of the folder, as the record calls them.
NAMES = {"report": "benchmark.md", "figures": "benchmark.json", "plot": "speed.png"}

app = typer.Typer(rich_markup_mode="markdown", add_completion=False)


@app.command(cls=SpreadingCommand, context_settings=CONTEXT)
@takes_fields(BenchmarkConfig, PANELS)
def benchmark(as_json: Json = False, quiet: Quiet = False, **given: Any) -> None:
    """Measure time and memory of a prompt in every variant, on random weights of a model's shape.

    One process measures every variant in turn; each measurement is a file in `--output-dir`, and what is there is not
    measured again. Whatever is in the folder, also of kvpress (`scripts/kvpress_benchmark.py`), goes into
    `benchmark.json`, `benchmark.md` and `speed.png`.

    **Examples**

        semtoken benchmark --shapes 160m --lengths 1024 4096 --ratios 2.4 4 --output-dir benchmark
        semtoken benchmark --stage-only --stage-lengths 8192 131072
        semtoken benchmark --report --json

    **Exit codes**: 0 measured; 1 a file is missing, or nothing is measured yet; 2 wrong usage; 130 Ctrl-C (start the
    same command again to go on).
    """
    from ..benchmarking.benchmark import benchmark

    with ending_well("start the same command again to go on"), only_json(as_json) as answer, bars(quiet):
        folder = benchmark(build(BenchmarkConfig, given))
        found = json.loads((folder / "benchmark.json").read_text(encoding="utf-8"))
        files = {name: folder / file for name, file in NAMES.items() if (folder / file).exists()}
        answer({"folder": folder, **files, "results": found})
        if not as_json:
            console().print(f"report: {files['report']}")
