#!/usr/bin/env python
"""Write a checkpoint's card into its folder, with the figures of an evaluation that was already run.

    semtoken evaluate --checkpoint model_cards/semtoken-llama-tiny --data_dir data
    python scripts/make_card.py --checkpoint model_cards/semtoken-llama-tiny --training_log runs/reference/log.jsonl \\
        --training_command "python scripts/train_reference.py ..." --metrics evaluation/FOLDER/metrics.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import semtoken_hf  # noqa: F401 (registers the classes)
from semtoken_hf.evaluation.model_card import CardSources, write_card

TEMPLATE = Path(__file__).resolve().parent.parent / "model_cards" / "TEMPLATE.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path)
    parser.add_argument("--training_log", required=True, type=Path)
    parser.add_argument("--training_command", required=True, help="what was run to train the plain model")
    parser.add_argument("--adaptation_command", help="what was run to adapt it, if it is adapted")
    parser.add_argument("--metrics", required=True, type=Path, help="metrics.json of the evaluation")
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32).eval()
    sources = CardSources(
        TEMPLATE,
        arguments.training_log,
        arguments.training_command,
        arguments.metrics,
        arguments.adaptation_command,
    )
    folder = arguments.checkpoint.resolve()
    write_card(model, folder, sources)
    print(folder / "README.md")


if __name__ == "__main__":
    main()
