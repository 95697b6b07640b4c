"""A checkpoint of an earlier version, rewritten in place: today's fields and modules, the same weights."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from transformers import MODEL_MAPPING, AutoConfig
from transformers.utils import CONFIG_NAME

from ..evaluation.files import write_text
from ..pretrained_semtoken import auto_map_of
from ..publishing.module_hashes import PACKAGE, module_hashes, named_modules, needed_modules, with_modules
from .checkpoint import load_tokenizer
from .source import check_semtoken
from .staging import check_output, remove_stale, staged_folder
from .text_markers import text_markers


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
            if file.name != "config.json":
                _link(file, staged / file.relative_to(folder))
        config.save_pretrained(staged)
        renew_modules(staged)
    return folder


def _link(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, target)
    except OSError:
        shutil.copy2(file, target)


def renew_modules(folder: Path) -> None:
    """Give a checkpoint the modules of this package that it needs and no others, and its card their hashes.

    Its `auto_map` names every head that the family has today. Files are replaced, never written into: another folder
    may share them.
    """
    config = AutoConfig.from_pretrained(folder)
    content = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    content["auto_map"] = dict(sorted({**content["auto_map"], **auto_map_of(MODEL_MAPPING[type(config)])}.items()))
    write_text(folder / CONFIG_NAME, json.dumps(content, indent=2) + "\n")
    for file in folder.glob("*.py"):
        file.unlink()
    for name in needed_modules(PACKAGE, named_modules(folder)):
        shutil.copyfile(PACKAGE / name, folder / name)
    if (card := folder / "README.md").is_file():
        write_text(card, with_modules(card.read_text(encoding="utf-8"), module_hashes(folder.glob("*.py"))))


__all__ = ["renew_modules", "upgrade_checkpoint"]
