#!/usr/bin/env python
"""What the learned merger adds to a prefill: its own time beside the prefill's, alternating, in one process.

    python scripts/benchmark_merger.py --checkpoint model_cards/semtoken-llama-tiny --text_file wiki.valid.txt \\
        --output model_cards/semtoken-llama-tiny/merger_cost.md

Beside the checkpoint itself: a Llama of 1.1 B parameters (random weights, bfloat16) on the same tokens.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from semtoken_hf import SemTokenLlamaConfig, SemTokenLlamaForCausalLM
from semtoken_hf.evaluation.provenance import publish_report
from semtoken_hf.evaluation.side_by_side import timed
from semtoken_hf.span_planner import plan_spans

SHAPE_1B: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="SemToken folder with a learned merger")
    parser.add_argument("--text_file", required=True, type=Path)
    parser.add_argument("--tokens", type=int, default=2048, help="length of the prompt")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--skip_1b", action="store_true", help="the checkpoint alone")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    return parser.parse_args()


@torch.no_grad()
def measure(name: str, model: Any, ids: Tensor, repetitions: int) -> str:
    """One table row: medians of the merger's own call and of the whole prefill."""
    spans = plan_spans(model.config, model.model.semantic_encoder, ids).spans
    embeddings = model.get_input_embeddings()(ids)[0]
    slots = embeddings[spans.first]

    def prefill() -> Any:
        return model(ids, logits_to_keep=1)

    def merge() -> Any:
        return model.model.learned_merger(embeddings, spans, slots)

    prefill(), merge()
    pairs = [(timed(merge)[0], timed(prefill)[0]) for _ in range(repetitions)]
    own, whole = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
    share = 100 * statistics.median(m / p for m, p in pairs)
    return f"| {name} | {ids.shape[1]} | {len(spans)} | {own:.2f} | {whole:.1f} | {share:.2f} % |"


def main() -> None:
    arguments = parse_arguments()
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    text = arguments.text_file.read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, : arguments.tokens]
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint).eval()
    if model.model.learned_merger is None:
        raise SystemExit(f"{arguments.checkpoint} has no learned merger: adapt it first")
    rows = [measure(Path(arguments.checkpoint).name, model, ids, arguments.repetitions)]
    if not arguments.skip_1b:
        config = SemTokenLlamaConfig(vocab_size=len(tokenizer), merge_mode="learned", **SHAPE_1B)
        big = SemTokenLlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
        rows.append(measure("1.1 B shape, random weights, bfloat16", big, ids, max(3, arguments.repetitions // 2)))
    lines = [
        "# Cost of the learned merger",
        "",
        f"First tokens of `{arguments.text_file.name}`, medians of {arguments.repetitions} alternating calls.",
        "",
        "| model | tokens | slots | merger, ms | prefill, ms | merger / prefill |",
        "|---|---|---|---|---|---|",
        *rows,
    ]
    publish_report(lines, arguments.output)


if __name__ == "__main__":
    main()
