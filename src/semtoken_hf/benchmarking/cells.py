"""Measurements in pieces that a killed run keeps: one file for every shape, batch, length and ratio."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..evaluation.files import write_text
from ..evaluation.provenance import provenance
from .clock import available_bytes, rounds_left, seconds_of
from .configuration import BenchmarkConfig
from .models import build_model, load_planner, plain_twin, text_ids
from .shapes import dtype_of, shape_of
from .stage_clock import StageClock
from .variants import Variant, list_variants
from .workloads import BATCHES, make_batch

TIMES = ("prefill", "decode", "generate")


@dataclass(frozen=True)
class Cell:
    """One file of results."""

    shape: str
    encoder: str
    batch: str
    ratio: float
    length: int

    def path(self, folder: Path) -> Path:
        name = f"{self.shape}__{self.encoder}__batch-{self.batch}__{self.length}@{self.ratio:g}.json"
        return folder / "cells" / name


class Bench:
    """A model of one shape, and the text.

    Args:
        positions: longest sequence.
        layers: of the model; None: the shape's.
    """

    def __init__(self, config: BenchmarkConfig, shape: str, positions: int, layers: int | None = None):
        self.config, self.shape = config, shape
        self.ids = text_ids(config.checkpoint, config.text_file)
        encoder = config.encoder, config.encoder_kind, config.encoder_layers
        planner = load_planner(config.checkpoint, *encoder, **config.fields)
        sizes = shape_of(shape) if layers is None else replace(shape_of(shape), num_hidden_layers=layers)
        dtype = None if config.dtype is None else dtype_of(config.dtype)
        self.model = build_model(sizes, config.torch_device, dtype, planner, positions, config.attn_implementation)

    @property
    def origin(self) -> dict[str, Any]:
        """What every file of results says of itself."""
        return {
            "shape": self.shape,
            "encoder": self.config.encoder_name,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.config.torch_device.type,
            "settings": self.config.settings(),
            "provenance": provenance(),
        }


def list_cells(config: BenchmarkConfig, shape: str) -> list[Cell]:
    """From short to long, so that what takes too long is known before it is tried."""
    return [
        Cell(shape, config.encoder_name, batch, ratio, length)
        for batch in BATCHES
        if batch in config.batches
        for ratio in config.ratios
        for length in sorted(config.lengths)
    ]


def read_result(path: Path, config: BenchmarkConfig) -> dict[str, Any] | None:
    """What is in a file of results; None where it has to be measured, perhaps again."""
    if not path.exists():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    return result if result["settings"] == config.settings() else None


def run_cells(config: BenchmarkConfig, shape: str) -> None:
    """Measure the cells of one shape that are missing."""
    cells = list_cells(config, shape)
    missing = [cell for cell in cells if read_result(cell.path(config.folder), config) is None]
    if not missing:
        return
    bench = Bench(config, shape, max(config.lengths) + config.new_tokens)
    plain = plain_twin(bench.model)
    for cell in tqdm(missing, desc=shape, unit="cell"):
        before = [read_result(c.path(config.folder), config) for c in cells if _is_shorter(c, cell)]
        result = measure_cell(bench, plain, cell, [r for r in before if r is not None])
        write_text(cell.path(config.folder), json.dumps(result, indent=1) + "\n")


def _is_shorter(cell: Cell, other: Cell) -> bool:
    return (cell.batch, cell.ratio) == (other.batch, other.ratio) and cell.length < other.length


def measure_cell(bench: Bench, plain: Any, cell: Cell, before: list[dict[str, Any]]) -> dict[str, Any]:
    """Every way to read one batch, in turn in each round.

    Args:
        plain: plain Llama on the weights of the bench's model.
        before: results of the same batch and ratio at shorter lengths, in their order.

    Returns:
        JSON: `variants` by name (slots of each row, kv_bytes, peak_bytes, and a sample a round of prefill, decode and
        generate in seconds), `stages` (seconds by part, one entry a round), `stage` (seconds of the stage undisturbed),
        `skipped` (why, by the name of a variant), and where it comes from.
    """
    config, model = bench.config, bench.model
    batch = make_batch(cell.batch, bench.ids, cell.length, model.device)
    variants = list_variants(model, plain, batch, cell.ratio, config.attn_implementation, config.prefill_chunk_size)
    skipped: dict[str, str] = {}
    found: dict[str, dict[str, Any]] = {}
    for variant in variants:
        reason = why_skip(variant.name, cell.length, before, config.max_seconds, available_bytes(model.device))
        try:
            if reason is None:
                found[variant.name] = {**variant.inspect(), **{name: [] for name in TIMES}}
        except torch.OutOfMemoryError:
            reason = "out of memory"
        if reason is not None:
            skipped[variant.name] = reason
    stage = partial(model.compress, batch.input_ids, batch.attention_mask, target_ratio=cell.ratio)
    rounds = measure_rounds([variant for variant in variants if variant.name in found], model, stage, config)
    for name, samples in rounds.pop("variants").items():
        found[name] |= samples
    return {
        **bench.origin,
        "batch": cell.batch,
        "rows": batch.lengths,
        "length": cell.length,
        "ratio": cell.ratio,
        "slot_bytes": shape_of(cell.shape).slot_bytes(model.dtype),
        "variants": found,
        "skipped": skipped,
        **rounds,
    }


def why_skip(
    name: str, length: int, before: list[dict[str, Any]], max_seconds: float, available: int | None
) -> str | None:
    """Why a variant is not tried at a length, from its time at the longest one before, which grows with the square."""
    known = [result for result in before if name in result["variants"]]
    if not known:
        return None
    last, growth = known[-1]["variants"][name], length / known[-1]["length"]
    seconds, peak = min(last["generate"]) * growth**2, last["peak_bytes"]
    if seconds > max_seconds:
        return f"predicted to take {seconds:,.0f} s, which is more than {max_seconds:g} s"
    if peak is not None and available is not None and peak * growth > available:
        return f"predicted to need {peak * growth / 1e9:.1f} GB, and {available / 1e9:.1f} GB are free"
    return None


@torch.no_grad()
def measure_rounds(variants: list[Variant], model: Any, stage: Any, config: BenchmarkConfig) -> dict[str, Any]:
    """Samples of every variant and of the stage, alternating.

    The first round is left out, unless there is no time for a second one; a prefill has then warmed each variant up.
    """
    found: dict[str, Any] = {
        "variants": {variant.name: {name: [] for name in TIMES} for variant in variants},
        "stages": [],
        "stage": [],
    }

    def play() -> None:
        for variant in variants:
            for name, seconds in variant.measure(config.new_tokens).items():
                found["variants"][variant.name][name].append(seconds)
        # First, behind other work as in a prefill; the second call finds its data in the processor's caches.
        with StageClock(model.base_model.semantic_encoder) as clock:
            stage()
        found["stages"].append(dict(clock.seconds))
        found["stage"].append(seconds_of(stage))

    count = rounds_left(seconds_of(play), config.max_seconds, config.repetitions)
    for _ in range(count):
        play()
    if count:
        for samples in (
            *(s for variant in found["variants"].values() for s in variant.values()),
            found["stages"],
            found["stage"],
        ):
            del samples[0]
    return {**found, "warmed_up": count > 0}


__all__ = ["Bench", "Cell", "list_cells", "measure_cell", "measure_rounds", "read_result", "run_cells"]
