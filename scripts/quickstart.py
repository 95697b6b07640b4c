#!/usr/bin/env python
"""Read a whole chapter with the embedded checkpoint, with and without compression, and compare.

bash scripts/quickstart.sh                      # sets up an environment, then runs this
python scripts/quickstart.py --target_ratio 4 --text_file my_document.txt
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import pipeline, set_seed
from transformers.utils import logging

import semtoken_hf  # noqa: F401 (registers the classes)
from semtoken_hf.evaluation.provenance import markdown_provenance
from semtoken_hf.evaluation.side_by_side import read_side_by_side, side_by_side_table

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=str(ROOT / "model_cards" / "semtoken-llama-tiny"))
    parser.add_argument("--text_file", type=Path, default=ROOT / "scripts" / "quickstart_chapter.txt")
    parser.add_argument("--target_ratio", type=float, help="tokens per slot (default: the checkpoint's)")
    parser.add_argument("--max_new_tokens", type=int, default=48)
    parser.add_argument("--repetitions", type=int, default=7)
    arguments = parser.parse_args()

    set_seed(0)
    logging.set_verbosity_error()
    device = 0 if torch.cuda.is_available() else -1
    pipe = pipeline("text-generation", model=arguments.checkpoint, dtype=torch.float32, device=device)
    prompt = arguments.text_file.read_text(encoding="utf-8").rstrip()
    readings = read_side_by_side(
        pipe, prompt, arguments.max_new_tokens, arguments.repetitions, target_ratio=arguments.target_ratio
    )
    print(f"\n{arguments.text_file.name}, greedy, medians of {arguments.repetitions} alternating repetitions\n")
    print(side_by_side_table(readings))
    print(f"\nThe prompt ends: ...{prompt[-200:]}\n")
    for name, reading in readings.items():
        print(f"{name} goes on: {reading.continuation}\n")
    print(markdown_provenance())


if __name__ == "__main__":
    main()
