#!/usr/bin/env python
"""Where the time of a prefill goes, by operator: the compression stage alone, and the whole.

    python scripts/profile_prefill.py --shapes 1.1b --lengths 4096 --output-dir benchmark

Options are those of `scripts/benchmark.py`, of which the shapes, lengths, first ratio and encoder are read. Beside the
table, `profile_*.json` opens as a flame graph in chrome://tracing or https://ui.perfetto.dev.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from semtoken_hf.benchmarking.cells import Bench
from semtoken_hf.benchmarking.configuration import BenchmarkConfig
from semtoken_hf.benchmarking.workloads import make_batch
from semtoken_hf.evaluation.option_names import DataclassParser
from semtoken_hf.evaluation.provenance import publish_report

OPERATORS = 12


def profiled(call: Callable[[], Any], device: torch.device) -> Any:
    """The profiler after one call; another one has warmed up."""
    call()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        call()
    return profiler


def table(profiler: Any, device: torch.device) -> list[str]:
    """Operators by their own time, as lines of Markdown."""
    name = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, name))
    times = [getattr(event, name) / 1e3 for event in events]
    total = sum(times)
    rows = [
        f"| `{event.key}` | {event.count} | {own:.2f} | {100 * own / total:.1f} % |"
        for event, own in zip(events[:OPERATORS], times, strict=False)
    ]
    return ["| operator | calls | ms | |", "|---|---|---|---|", *rows, f"| all | | {total:.2f} | |"]


@torch.no_grad()
def main() -> None:
    (config,) = DataclassParser(BenchmarkConfig).parse_args_into_dataclasses()  # type: ignore[arg-type]
    device, ratio, lines = config.torch_device, config.ratios[0], ["# Where the time of a prefill goes"]
    config.folder.mkdir(parents=True, exist_ok=True)
    for shape in config.shapes:
        bench = Bench(config, shape, max(config.lengths))
        for length in config.lengths:
            ids = make_batch("1", bench.ids, length, device).input_ids
            calls = {
                "stage": lambda ids=ids, model=bench.model: model.compress(ids, target_ratio=ratio),
                "prefill": lambda ids=ids, model=bench.model: model(ids, logits_to_keep=1, target_ratio=ratio),
            }
            for name, call in calls.items():
                profiler = profiled(call, device)
                profiler.export_chrome_trace(str(config.folder / f"profile_{shape}_{length}_{name}.json"))
                lines += ["", f"{shape}, {length:,} tokens, {name}:", "", *table(profiler, device)]
    publish_report(lines, config.folder / "profile.md")


if __name__ == "__main__":
    main()
