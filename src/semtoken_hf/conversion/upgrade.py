"""A checkpoint of an earlier version, rewritten in place: today's fields and modules, the same weights."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ..publishing.module_hashes import PACKAGE, module_hashes, named_modules, needed_modules, with_modules
from .checkpoint import load_tokenizer
from .source import check_semtoken
from .staging import check_output, remove_stale, staged_folder
from .text_markers import text_markers

CARD = "README.md"


def upgrade_checkpoint(folder: str | os.PathLike) -> Path:
    """Rewrite a SemToken folder so that it reads as one that is converted today.

    Fields that were renamed or are gone become today's, markers of sentences and chat turns are found where the folder
    lacks them, and the modules become this package's. The folder is replaced whole or not at all; weights are linked,
    not copied, where the file system allows.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no tokenizer.json.
        ValueError: it is no SemToken checkpoint, or a field makes no sense.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: a checkpoint is upgraded where it lies")
    remove_stale(folder)
    check_output(folder, True, [])
    config = AutoConfig.from_pretrained(folder)
    check_semtoken(config, folder)
    if config.text_markers is None:
        config.text_markers = text_markers(load_tokenizer(folder), config.vocab_size)
    with staged_folder(folder, overwrite=True) as staged:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            if file.name != "config.json" and (file.suffix != ".py" or file.parent != folder):
                _link(file, staged / file.relative_to(folder))
        config.save_pretrained(staged)
        _renew_modules(staged)
    return folder


def _link(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if file.name == CARD:  # written again
        shutil.copy2(file, target)
        return
    try:
        os.link(file, target)
    except OSError:
        shutil.copy2(file, target)


def _renew_modules(folder: Path) -> None:
    """This package's modules for a folder without any, and their hashes in its card."""
    names: Any = needed_modules(PACKAGE, named_modules(folder))
    for name in names:
        shutil.copyfile(PACKAGE / name, folder / name)
    card = folder / CARD
    if card.is_file():
        text = card.read_text(encoding="utf-8")
        card.write_text(with_modules(text, module_hashes(folder.glob("*.py"))), encoding="utf-8")


__all__ = ["upgrade_checkpoint"]
