#!/usr/bin/env python
"""What the compression stage costs beside one float32 pass of its encoder, for every dtype of the encoder.

    python scripts/measure_encoder_dtype.py --checkpoint "$(bash scripts/reference_model.sh minilm)"
    # as on a processor that has AVX2 and nothing newer:
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python scripts/measure_encoder_dtype.py --checkpoint FOLDER

The pass reads the same tokens once, in windows without overlap. All take turns in one process; medians.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from semtoken_hf import SpanPlanner
from semtoken_hf.configuration_semtoken import ENCODER_DTYPES
from semtoken_hf.evaluation.option_names import DashedParser
from semtoken_hf.evaluation.provenance import publish_report
from semtoken_hf.evaluation.side_by_side import timed
from semtoken_hf.semantic_encoder import WINDOWS_PER_CALL, native_dtype

ROOT = Path(__file__).resolve().parent.parent


def one_pass(encoder: Any, ids: torch.Tensor, window: int) -> Callable[[], None]:
    """A call that reads int64 [n] in windows without overlap."""
    windows = ids[: len(ids) // window * window].view(-1, window)

    @torch.no_grad()
    def run() -> None:
        for part in windows.split(WINDOWS_PER_CALL):
            encoder(inputs_embeds=encoder.get_input_embeddings()(part))

    return run


def main() -> None:
    parser = DashedParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="with a transformer encoder")
    parser.add_argument("--text-file", type=Path, default=ROOT / "scripts" / "quickstart_chapter.txt")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    tokens = AutoTokenizer.from_pretrained(arguments.checkpoint)(arguments.text_file.read_text("utf-8"))["input_ids"]
    ids = torch.tensor((tokens * (arguments.length // len(tokens) + 1))[: arguments.length])
    planners = {d: SpanPlanner.from_pretrained(arguments.checkpoint, {"encoder_dtype": d}) for d in ENCODER_DTYPES}
    whole = planners["float32"].encoder
    calls: dict[str, Callable[[], Any]] = {"one pass": one_pass(whole.encoder, ids, whole.window)}
    for dtype, planner in planners.items():
        calls[dtype] = lambda planner=planner: planner.plan(ids[None])
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(arguments.repetitions + 1):
        for name, call in calls.items():
            taken, _ = timed(call)
            if repetition:  # the first one warms up
                seconds[name].append(taken)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    kernels, native = torch.backends.cpu.get_cpu_capability(), native_dtype(torch.device("cpu"))
    lines = [
        f"A prompt of {arguments.length:,} tokens; kernels for {kernels}; `auto` is {native} here.",
        "",
        "| `encoder_dtype` | planning, ms | beside one float32 pass |",
        "|---|---|---|",
        *(f"| {n} | {1e3 * medians[n]:.0f} | {medians[n] / medians['one pass']:.2f} x |" for n in ENCODER_DTYPES),
    ]
    publish_report(lines, arguments.output)


if __name__ == "__main__":
    main()
