#!/usr/bin/env python
"""Choose the defaults by measurement: segmentation, radius, tau and merge mode on one checkpoint and one text.

    python scripts/measure_defaults.py --checkpoint model_cards/semtoken-llama-tiny --text_file wiki.valid.txt \\
        --output model_cards/semtoken-llama-tiny/defaults.md
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from semtoken_hf.evaluation.chance import chance_instead_of_entropy
from semtoken_hf.evaluation.compressed_perplexity import (
    PerplexityResult,
    evaluate_method,
    evaluate_references,
    perplexity_table,
)
from semtoken_hf.evaluation.methods import Compressed
from semtoken_hf.evaluation.provenance import publish_report
from semtoken_hf.evaluation.texts import make_windows

# (segmentation, k, tau or None for solved, recency, whether chance replaces entropy)
PLANS = (
    ("uniform", 0, None, 0, False),
    *(("boundary", radius, None, 0, False) for radius in (0, 2, 4)),
    *(("greedy", radius, tau, 0, False) for tau in (None, 0.5, 0.0, -1.0) for radius in (0, 2, 4)),
    *(("greedy", 2, -1.0, recency, False) for recency in (0.5, 1, 2, 4, 16)),
    *(("greedy", 2, -1.0, recency, True) for recency in (0, 1, 2, 4, 16)),
)
MERGE_MODES = ("mean", "representative")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--text_file", required=True)
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    parser.add_argument("--ratio", type=float, default=2.4)
    parser.add_argument("--context", type=int, default=1792, help="context tokens of a window")
    parser.add_argument("--target", type=int, default=256, help="scored tokens of a window")
    parser.add_argument("--windows", type=int, default=40)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32).eval()
    text = Path(arguments.text_file).read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    windows = make_windows(ids, arguments.context, arguments.target, tokenizer.bos_token_id, arguments.windows)

    results = evaluate_references(model, windows, arguments.context, [arguments.ratio])[arguments.ratio]
    full, none = results[0], results[1]
    for merge_mode, plan in itertools.product(MERGE_MODES, PLANS):
        results.append(measure_variant(model, windows, merge_mode, *plan, arguments))
    report(results, full, none, arguments)


def measure_variant(
    model: Any,
    windows: torch.Tensor,
    merge_mode: str,
    segmentation_mode: str,
    radius: int,
    tau: float | None,
    recency: float,
    by_chance: bool,
    arguments: argparse.Namespace,
) -> PerplexityResult:
    """Perplexity with these fields; `by_chance` keeps random spans fine instead of those of highest entropy."""
    fields = {"merge_mode": merge_mode, "segmentation_mode": segmentation_mode, "similarity_threshold": tau}
    fields |= {"merger_base": merge_mode, "recency": recency, "fingerprint_radius": radius}
    name = f"{merge_mode} of {segmentation_mode} spans, k = {radius}"
    if segmentation_mode == "greedy":
        name += ", tau solved" if tau is None else f", tau <= {tau:g}"
    if recency:
        name += f", recency {recency:g}"
    if by_chance:
        name += ", chance instead of entropy"
    with chance_instead_of_entropy(0, by_chance):
        return evaluate_method(
            name, model, windows, Compressed(name, fields=fields), arguments.context, arguments.ratio
        )


def report(
    results: list[PerplexityResult], full: PerplexityResult, none: PerplexityResult, arguments: argparse.Namespace
) -> None:
    lines = [
        f"# Untrained merging at ratio {arguments.ratio}",
        "",
        f"Context-compressed perplexity of `{Path(arguments.text_file).name}`, {len(full.losses)} windows of "
        f"{arguments.context} + {arguments.target} tokens. Cost: perplexity against the full context. "
        "Spread: standard error of the paired loss difference to the full context, in % of perplexity.",
        "",
        *perplexity_table(results, full, none),
    ]
    publish_report(lines, arguments.output)


if __name__ == "__main__":
    main()
