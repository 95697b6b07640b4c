#!/usr/bin/env python
"""What the compression stage costs: each stage side by side with one windowed pass of the same encoder, and per token.

    python scripts/benchmark_stage.py --model model_cards/semtoken-llama-tiny --encoder all-MiniLM-L6-v2 \\
        --text_file wiki.valid.txt --output model_cards/semtoken-llama-tiny/stage_cost.md
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from semtoken_hf import SpanPlanner
from semtoken_hf.compression import compress_prompt
from semtoken_hf.conversion.planner import planner_on_vocabulary
from semtoken_hf.evaluation.provenance import publish_report
from semtoken_hf.semantic_encoder import WINDOWS_PER_CALL

LENGTHS = (2048, 8192, 32768, 131072)
MODES = ("boundary", "greedy")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint whose vocabulary is read")
    parser.add_argument("--encoder", required=True, help="folder or Hub id of the encoder")
    parser.add_argument("--text_file", required=True, type=Path)
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    parser.add_argument("--tokens", type=int, default=8000, help="length of the side-by-side part")
    parser.add_argument("--hidden_size", type=int, default=2048, help="width of the embeddings that are merged")
    parser.add_argument("--repetitions", type=int, default=5)
    return parser.parse_args()


def windowed_pass(planner: SpanPlanner, ids: Tensor) -> None:
    """The encoder alone over the windows of `ids`, as few as cover the text with the planner's overlap."""
    encoder = planner.encoder
    windows = ids[0].unfold(0, encoder.window, encoder.window - encoder.overlap)
    with torch.no_grad():
        for batch in windows.split(WINDOWS_PER_CALL):
            encoder.encoder(input_ids=batch.contiguous())


def alternate(calls: Mapping[str, Callable[[], Any]], repetitions: int) -> dict[str, float]:
    """Median seconds of each call, run in turn after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(repetitions + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repetition:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


class Stage:
    """The compression stage in one segmentation mode; with `fingerprints`, everything but the encoder."""

    def __init__(self, planner: SpanPlanner, mode: str, embed: nn.Embedding, fingerprints: Tensor | None = None):
        self.config = copy.deepcopy(planner.config)
        self.config.segmentation_mode = mode
        self.encoder: Any = planner.encoder if fingerprints is None else lambda *_: fingerprints
        self.embed = embed

    def __call__(self, ids: Tensor) -> Any:
        return compress_prompt(self.config, self.encoder, self.embed, ids)


def side_by_side(planner: SpanPlanner, embed: nn.Embedding, ids: Tensor, repetitions: int) -> list[str]:
    """Table rows: the encoder alone, the whole stage, and the stage without the encoder."""
    known = planner.encoder(ids[0], planner.plan(ids).layout)
    calls: dict[str, Callable[[], Any]] = {"encoder alone": partial(windowed_pass, planner, ids)}
    for mode in MODES:
        calls[f"{mode}: whole stage"] = partial(Stage(planner, mode, embed), ids)
        calls[f"{mode}: stages 2 + 3 + merging"] = partial(Stage(planner, mode, embed, known), ids)
    medians = alternate(calls, repetitions)
    return [f"| {name} | {1e3 * s:.0f} | {s / medians['encoder alone']:.2f} |" for name, s in medians.items()]


def cost_per_token(name: str, planner: SpanPlanner, embed: nn.Embedding, stream: Tensor) -> list[str]:
    """Table rows: microseconds per token of the whole stage, by prompt length."""
    rows = []
    for mode in MODES:
        stage = Stage(planner, mode, embed)
        calls = {str(n): partial(stage, stream[None, :n]) for n in LENGTHS}
        seconds = alternate(calls, repetitions=3)
        cells = [f"{1e6 * seconds[str(n)] / n:.1f}" for n in LENGTHS]
        rows.append(f"| {name}, {mode} | " + " | ".join(cells) + " |")
    return rows


def main() -> None:
    arguments = parse_arguments()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = arguments.text_file.read_text(encoding="utf-8")
    stream = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    stream = stream.repeat(-(-max(LENGTHS) // len(stream)))
    embed = nn.Embedding(len(tokenizer), arguments.hidden_size).requires_grad_(False)
    transformer = planner_on_vocabulary(tokenizer, arguments.encoder)
    static = planner_on_vocabulary(tokenizer, arguments.encoder, "static")
    lines = [
        "# Cost of the compression stage",
        "",
        f"{arguments.tokens:,} tokens of `{arguments.text_file.name}`, embeddings of width {arguments.hidden_size}, "
        f"medians of {arguments.repetitions} alternating runs. Encoder alone: one windowed pass of the same "
        f"`{Path(arguments.encoder).name}` over the same text.",
        "",
        "| | ms | / encoder alone |",
        "|---|---|---|",
        *side_by_side(transformer, embed, stream[None, : arguments.tokens], arguments.repetitions),
        "",
        "Whole stage, microseconds per token, medians of 3:",
        "",
        "| encoder, mode | " + " | ".join(f"{n:,} tokens" for n in LENGTHS) + " |",
        "|---" * (1 + len(LENGTHS)) + "|",
        *cost_per_token("static", static, embed, stream),
        *cost_per_token("transformer", transformer, embed, stream),
    ]
    publish_report(lines, arguments.output)


if __name__ == "__main__":
    main()
