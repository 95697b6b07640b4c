"""Time and memory of reading a prompt and going on, beside plain Llama over n tokens and over m.

One process measures every variant in turn; each measurement is a file in --output-dir, and what is there is not
measured again. Whatever is in the folder, also of kvpress (scripts/kvpress_benchmark.py), goes into one JSON, table and
plot.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..evaluation.files import write_text
from .cells import run_cells
from .compiled import run_compiled
from .configuration import BenchmarkConfig
from .models import load_planner, text_ids
from .report import write_report
from .shapes import shape_of
from .stage import run_stage

FOLDERS = ("cells", "stage", "compiled")


def benchmark(config: BenchmarkConfig) -> Path:
    """Measure what is missing, then write `benchmark.json`, `benchmark.md` and `speed.png`; returns the folder.

    Raises:
        ValueError: nothing is measured yet and `report` asks for nothing else.
    """
    if not config.report:
        if not config.stage_only and not config.compile:
            write_plan(config)
        for shape in config.shapes:
            if config.stage_only:
                run_stage(config, shape)
            if config.compile:
                run_compiled(config, shape)
            if not config.stage_only and not config.compile:
                run_cells(config, shape)
    found = collect(config.folder)
    if not any(found.values()):
        raise ValueError(f"nothing is measured yet in {config.folder}: run the same command without --report")
    write_text(config.folder / "benchmark.json", json.dumps(found, indent=1) + "\n")
    write_report(found, config.folder)
    return config.folder


def collect(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Every result in a folder, by kind; those of kvpress where they have come back."""
    found: dict[str, list[dict[str, Any]]] = {
        name: [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / name).glob("*.json"))]
        for name in FOLDERS
    }
    for results in found.values():
        results.sort(key=lambda r: (r["shape"], r.get("batch", ""), r["ratio"], r["length"]))
    presses = folder / "kvpress.json"
    found["kvpress"] = json.loads(presses.read_text(encoding="utf-8")) if presses.exists() else []
    return found


def write_plan(config: BenchmarkConfig) -> None:
    """`plan.json`: what the environment of kvpress, which cannot load this package, reads the same prompts from."""
    vocab_size = load_planner(config.checkpoint).config.vocab_size
    plan = {
        "ids": text_ids(config.checkpoint, config.text_file).tolist(),
        "shapes": {name: asdict(shape_of(name)) for name in config.shapes},
        "vocab_size": vocab_size,
        "device": str(config.torch_device),
        **{
            name: getattr(config, name)
            for name in (
                "lengths",
                "ratios",
                "dtype",
                "attn_implementation",
                "new_tokens",
                "repetitions",
                "max_seconds",
            )
        },
    }
    write_text(config.folder / "plan.json", json.dumps(plan) + "\n")


__all__ = ["benchmark", "collect", "write_plan"]
