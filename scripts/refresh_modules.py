#!/usr/bin/env python
"""Copy this package's modules into the checkpoints of `model_cards/`, and list their hashes in the cards.

    python scripts/refresh_modules.py

`model_cards/MODULES.sha256` then lists the modules of this release, for `sha256sum -c`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from semtoken_hf.evaluation.files import write_text
from semtoken_hf.publishing.module_hashes import (
    PACKAGE,
    checksum_lines,
    module_hashes,
    named_modules,
    needed_modules,
    shipped_modules,
    with_modules,
)

CARDS = Path(__file__).resolve().parent.parent / "model_cards"


def refresh(folder: Path) -> None:
    """Give a checkpoint the modules of this package that it needs and no others, and its card their hashes."""
    for file in folder.glob("*.py"):
        file.unlink()
    for name in needed_modules(PACKAGE, named_modules(folder)):
        shutil.copyfile(PACKAGE / name, folder / name)
    card = folder / "README.md"
    write_text(card, with_modules(card.read_text(encoding="utf-8"), module_hashes(folder.glob("*.py"))))


def main() -> None:
    for config in sorted(CARDS.glob("*/config.json")):
        refresh(config.parent)
        print(config.parent)
    write_text(CARDS / "MODULES.sha256", checksum_lines(module_hashes(shipped_modules())))


if __name__ == "__main__":
    main()
