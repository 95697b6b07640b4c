"""The compression stage alone, on prompts of up to a million tokens: seconds and bytes per token."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..evaluation.files import write_text
from .cells import Bench, read_result
from .clock import available_bytes, peak_extra_bytes, rounds_left, seconds_of
from .configuration import BenchmarkConfig
from .stage_clock import ENCODER, ReplayedEncoder, StageClock
from .workloads import make_batch


def stage_path(config: BenchmarkConfig, shape: str, length: int, ratio: float) -> Path:
    return config.folder / "stage" / f"{shape}__{config.encoder_name}__{length}@{ratio:g}.json"


def run_stage(config: BenchmarkConfig, shape: str) -> None:
    """Measure the stage at the lengths that are missing; the layers of the model do not take part."""
    wanted = [(ratio, length) for ratio in config.ratios for length in sorted(config.stage_lengths)]
    missing = [w for w in wanted if read_result(stage_path(config, shape, w[1], w[0]), config) is None]
    if not missing:
        return
    bench = Bench(config, shape, max(config.stage_lengths), layers=1)
    per_token = 0.0
    for ratio, length in tqdm(missing, desc=f"stage, {shape}", unit="cell"):
        free = available_bytes(config.torch_device)
        result: dict[str, Any] = {**bench.origin, "length": length, "ratio": ratio}
        if free is not None and per_token * length > free:
            need, have = per_token * length / 1e9, free / 1e9
            result["skipped"] = f"predicted to need {need:.1f} GB, and {have:.1f} GB are free"
        else:
            result |= measure_stage(bench, length, ratio)
            per_token = max(per_token, (result["peak_bytes"] or 0) / length)
        write_text(stage_path(config, shape, length, ratio), json.dumps(result, indent=1) + "\n")


@torch.no_grad()
def measure_stage(bench: Bench, length: int, ratio: float) -> dict[str, Any]:
    """The stage on one prompt, its fingerprints given.

    Returns:
        slots; seconds (a sample a round) and peak_bytes without the encoder; encoder_seconds (a sample a round);
        stages: seconds by part, one entry a round, the parts' own waits included.
    """
    model, config = bench.model, bench.config
    batch = make_batch("1", bench.ids, length, model.device)
    stage = partial(model.compress, batch.input_ids, target_ratio=ratio, query_mask=batch.query_mask)
    encoder = model.base_model.semantic_encoder
    found: dict[str, Any] = {"seconds": [], "encoder_seconds": [], "stages": []}
    replayed = ReplayedEncoder(encoder, stage)
    with replayed:
        found["peak_bytes"], prompt = peak_extra_bytes(stage, model.device)
        found["slots"] = prompt.slot_counts
    del prompt

    def play() -> None:
        with StageClock(encoder) as clock:
            stage()
        found["encoder_seconds"].append(clock.seconds.pop(ENCODER, 0.0))
        found["stages"].append(dict(clock.seconds))
        with replayed:
            found["seconds"].append(seconds_of(stage))

    for _ in range(rounds_left(seconds_of(play), config.max_seconds, config.repetitions)):
        play()
    if len(found["seconds"]) > 1:
        for name in ("seconds", "encoder_seconds", "stages"):
            del found[name][0]
    return found


__all__ = ["measure_stage", "run_stage", "stage_path"]
