#!/usr/bin/env python
"""How similar neighbouring tokens are, and what ratio a fixed tau then gives: a real encoder on real text.

    python scripts/measure_similarity.py --model model_cards/semtoken-llama-tiny --encoder all-MiniLM-L6-v2 \\
        --text-file wiki.valid.txt --output model_cards/semtoken-llama-tiny/similarity.md

`--model` gives the vocabulary; the encoder is moved onto it as at conversion. Spans are the paper's greedy ones.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from semtoken_hf import SpanPlanner
from semtoken_hf.conversion.planner import planner_on_vocabulary
from semtoken_hf.evaluation.option_names import DashedParser
from semtoken_hf.evaluation.provenance import publish_report
from semtoken_hf.span_clustering import shifted_similarities

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
THRESHOLDS = (0.70, 0.80, 0.85, 0.90)
RADII = (0, 1, 2, 5)


def parse_arguments() -> argparse.Namespace:
    parser = DashedParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint whose vocabulary is read")
    parser.add_argument("--encoder", required=True, help="folder or Hub id of the encoder")
    parser.add_argument("--text-file", required=True, type=Path)
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    parser.add_argument("--tokens", type=int, default=20000)
    return parser.parse_args()


def threshold_ratio(planner: SpanPlanner, ids: Tensor, tau: float) -> float:
    """Tokens per span at a fixed tau, without budget, entropy or protected ends."""
    config = copy.deepcopy(planner.config)
    config.target_ratio, config.similarity_threshold, config.segmentation_mode = None, tau, "greedy"
    config.num_sink_tokens, config.recent_window, config.protected_token_ids = 0, 0, []
    return ids.shape[1] / int(SpanPlanner(config, planner.encoder).plan(ids).kept_lengths)


def main() -> None:
    arguments = parse_arguments()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    planner = planner_on_vocabulary(tokenizer, arguments.encoder)
    text = arguments.text_file.read_text(encoding="utf-8")
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"][: arguments.tokens]])
    lines = [
        "# Similarity of neighbouring tokens, and the ratio that a fixed tau gives",
        "",
        f"First {ids.shape[1]:,} tokens of `{arguments.text_file.name}` in the vocabulary of "
        f"`{Path(arguments.model).name}`; encoder `{Path(arguments.encoder).name}`, windows of "
        f"{planner.config.encoder_window} (overlap {planner.config.encoder_overlap}), span cap "
        f"{planner.config.max_span_length}.",
        "",
        "| radius k | "
        + " | ".join(f"{q:.0%} quantile" for q in QUANTILES)
        + " | "
        + " | ".join(f"ratio at tau {t:.2f}" for t in THRESHOLDS)
        + " |",
        "|---" * (1 + len(QUANTILES) + len(THRESHOLDS)) + "|",
    ]
    for radius in RADII:
        planner.encoder.radius = radius
        fingerprints = planner.plan(ids).fingerprints
        assert fingerprints is not None
        adjacent = shifted_similarities(fingerprints, 1)[0, :-1]
        quantiles = adjacent.quantile(torch.tensor(QUANTILES))
        ratios = [threshold_ratio(planner, ids, tau) for tau in THRESHOLDS]
        cells = [f"{radius}", *(f"{q:.2f}" for q in quantiles.tolist()), *(f"{r:.2f}" for r in ratios)]
        lines.append("| " + " | ".join(cells) + " |")
    publish_report(lines, arguments.output)


if __name__ == "__main__":
    main()
