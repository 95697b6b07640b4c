#!/usr/bin/env python
"""Measure a checkpoint and write its card and metrics.json into its folder.

    python scripts/make_card.py --checkpoint model_cards/semtoken-llama-tiny --training_log runs/reference/log.jsonl \\
        --training_command "python scripts/train_reference.py ..." --text_file wiki.valid.txt
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import semtoken_hf  # noqa: F401 (registers the classes)
from semtoken_hf.evaluation.model_card import CardSources, cost_table, write_card

TEMPLATE = Path(__file__).resolve().parent.parent / "model_cards" / "TEMPLATE.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path)
    parser.add_argument("--training_log", required=True, type=Path)
    parser.add_argument("--training_command", required=True, help="what was run to train the plain model")
    parser.add_argument("--adaptation_command", help="what was run to adapt it, if it is adapted")
    parser.add_argument("--text_file", required=True, type=Path, help="held-out text, such as WikiText validation")
    parser.add_argument("--context", type=int, default=1792, help="context tokens of a window")
    parser.add_argument("--target", type=int, default=256, help="scored tokens of a window")
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--ratios", type=float, nargs="+", default=[1.5, 2.4, 4.0])
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32).eval()
    metrics = write_card(
        model,
        tokenizer,
        arguments.checkpoint.resolve(),
        CardSources(
            TEMPLATE,
            arguments.training_log,
            arguments.training_command,
            arguments.text_file,
            arguments.context,
            arguments.target,
            arguments.windows,
            arguments.ratios,
            arguments.adaptation_command,
        ),
    )
    print(cost_table(metrics["costs"]))


if __name__ == "__main__":
    main()
