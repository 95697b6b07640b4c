#!/usr/bin/env python
"""Write a checkpoint's card into its folder, with the figures of an evaluation that was already run.

    semtoken evaluate --checkpoint model_cards/semtoken-llama-tiny --data_dir data
    python scripts/make_card.py --checkpoint model_cards/semtoken-llama-tiny --training_log runs/reference/log.jsonl \\
        --training_command "python scripts/train_reference.py ..." --metrics evaluation/FOLDER/metrics.json
    python scripts/make_card.py --hashes_only model_cards/semtoken-llama-tiny    # its modules have changed, no figure

Either way `model_cards/MODULES.sha256` then lists the modules of this release, for `sha256sum -c`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from semtoken_hf.evaluation.files import write_text
from semtoken_hf.publishing.module_hashes import checksum_lines, module_hashes, shipped_modules, with_modules

CARDS = Path(__file__).resolve().parent.parent / "model_cards"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hashes_only", type=Path, metavar="FOLDER", help="only refresh the list of its modules")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--training_log", type=Path)
    parser.add_argument("--training_command", help="what was run to train the plain model")
    parser.add_argument("--adaptation_command", help="what was run to adapt it, if it is adapted")
    parser.add_argument("--metrics", type=Path, help="metrics.json of the evaluation")
    return parser


def refresh_hashes(folder: Path) -> Path:
    """Write the list of a folder's modules into its card, and that of this release beside the cards."""
    card = folder.resolve() / "README.md"
    write_text(card, with_modules(card.read_text(encoding="utf-8"), module_hashes(folder.glob("*.py"))))
    write_text(CARDS / "MODULES.sha256", checksum_lines(module_hashes(shipped_modules())))
    return card


def make_card(arguments: argparse.Namespace) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from semtoken_hf.evaluation.model_card import CardSources, write_card

    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32).eval()
    sources = CardSources(
        CARDS / "TEMPLATE.md",
        arguments.training_log,
        arguments.training_command,
        arguments.metrics,
        arguments.adaptation_command,
    )
    write_card(model, arguments.checkpoint.resolve(), sources)


def main() -> None:
    parser = build_parser()
    arguments = parser.parse_args()
    if arguments.hashes_only is None:
        needed = ("checkpoint", "training_log", "training_command", "metrics")
        if missing := [f"--{name}" for name in needed if getattr(arguments, name) is None]:
            parser.error(f"a card needs {', '.join(missing)}; or pass --hashes_only FOLDER")
        make_card(arguments)
    print(refresh_hashes(arguments.hashes_only or arguments.checkpoint))


if __name__ == "__main__":
    main()
