#!/usr/bin/env python
"""Copy this package's modules into the checkpoints of `model_cards/`, and list their hashes in the cards.

    python scripts/refresh_modules.py

`model_cards/MODULES.sha256` then lists the modules of this release, for `sha256sum -c`.
"""

from __future__ import annotations

from pathlib import Path

from semtoken_hf.conversion.upgrade import renew_modules
from semtoken_hf.evaluation.files import write_text
from semtoken_hf.publishing.module_hashes import checksum_lines, module_hashes, shipped_modules

CARDS = Path(__file__).resolve().parent.parent / "model_cards"


def main() -> None:
    for config in sorted(CARDS.glob("*/config.json")):
        renew_modules(config.parent)
        print(config.parent)
    write_text(CARDS / "MODULES.sha256", checksum_lines(module_hashes(shipped_modules())))


if __name__ == "__main__":
    main()
