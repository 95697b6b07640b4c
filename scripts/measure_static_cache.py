#!/usr/bin/env python
"""A step of decoding over a dynamic and over a static cache, eager and compiled, of plain Llama and of SemToken.

    python scripts/measure_static_cache.py --shape 160m --length 2048 --output static_cache.md

Random weights of the shape read real text, then `generate` decodes; all variants take turns in one process. Medians
over the rounds, and of the ratios within each round; the first round compiles and is left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import CompileConfig

from semtoken_hf.benchmarking.clock import TokenStamps, median_ratio, summary
from semtoken_hf.benchmarking.models import build_model, load_planner, plain_twin, text_ids
from semtoken_hf.benchmarking.shapes import SHAPES, shape_of
from semtoken_hf.cache_semtoken import cache_bytes
from semtoken_hf.evaluation.option_names import DashedParser
from semtoken_hf.evaluation.provenance import publish_report

ROOT = Path(__file__).resolve().parent.parent
CACHES = ("dynamic", "static", "static, compiled")


def cache_arguments(cache: str) -> dict[str, Any]:
    """Arguments of `generate` for one of `CACHES`."""
    if cache == "dynamic":
        return {}
    if cache == "static":
        return {"cache_implementation": "static", "disable_compile": True}
    config: Any = CompileConfig(fullgraph=True)
    config._compile_all_devices = True  # Transformers leaves a CPU eager
    return {"cache_implementation": "static", "compile_config": config}


def decode(model: Any, ids: torch.Tensor, tokens: int, cache: str, **call: Any) -> tuple[float, int, list[int]]:
    """Seconds of a token, bytes of the cache, the text."""
    stamps, count = TokenStamps(), {"max_new_tokens": tokens, "min_new_tokens": tokens}
    arguments = {**count, **cache_arguments(cache), **call, "do_sample": False, "return_dict_in_generate": True}
    outputs = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=stamps, **arguments)
    return stamps.per_token, cache_bytes(outputs.past_key_values), outputs.sequences[0, ids.shape[1] :].tolist()


def rows(samples: dict[tuple[str, str], list[tuple[float, int, list[int]]]]) -> Iterator[str]:
    """The lines of the table."""
    seconds = {key: [sample[0] for sample in found] for key, found in samples.items()}
    for (name, cache), found in samples.items():
        of_dynamic = median_ratio(seconds[name, "dynamic"], seconds[name, cache])
        of_plain = median_ratio(seconds["plain", cache], seconds[name, cache])
        is_same = found[-1][2] == samples[name, "dynamic"][-1][2]
        yield (
            f"| {name} | {cache} | {1e3 * summary(seconds[name, cache])['median']:.1f} | {of_dynamic:.2f} | "
            f"{of_plain:.2f} | {found[-1][1] / 1e6:.1f} | {'yes' if is_same else 'no'} |"
        )


def main() -> None:
    parser = DashedParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="160m")
    parser.add_argument("--checkpoint", default=str(ROOT / "model_cards" / "semtoken-llama-tiny"))
    parser.add_argument("--text-file", default=str(ROOT / "scripts" / "quickstart_chapter.txt"))
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--ratio", type=float, default=2.4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    text = text_ids(arguments.checkpoint, arguments.text_file)
    ids = text.repeat(arguments.length // len(text) + 1)[None, : arguments.length]
    planner = load_planner(arguments.checkpoint, max_slots=None)
    model = build_model(shape_of(arguments.shape), encoder=planner, positions=2 * arguments.length)
    models = {"plain": (plain_twin(model), {}), "SemToken": (model, {"target_ratio": arguments.ratio})}
    samples: dict[tuple[str, str], list[tuple[float, int, list[int]]]] = {(n, c): [] for n in models for c in CACHES}
    for turn in range(arguments.rounds + 1):
        for (name, cache), found in samples.items():
            decoder, call = models[name]
            sample = decode(decoder, ids, arguments.new_tokens, cache, **call)
            if turn:
                found.append(sample)
    lines = [
        f"Shape `{arguments.shape}`, {arguments.length:,} tokens, {arguments.new_tokens} new ones, {arguments.ratio} "
        f"tokens per slot; medians of {arguments.rounds} rounds.",
        "",
        "| model | cache | step, ms | x faster than dynamic | x faster than plain | KV, MB | text as over dynamic |",
        "|---|---|---|---|---|---|---|",
        *rows(samples),
    ]
    publish_report(lines, arguments.output)


if __name__ == "__main__":
    main()
