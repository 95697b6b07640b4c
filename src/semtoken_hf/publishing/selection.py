"""Which files of a checkpoint folder go to the Hub: those that loading reads, and what the card shows; nothing else."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..adapter_semtoken import ADAPTER_FILES
from ..conversion.weights import find_tensors
from .module_hashes import CUSTOM_GENERATE, needed_modules

CONFIGURATION_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("tokenizer.model", "sentencepiece.bpe.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt"),
)
TEMPLATES = "additional_chat_templates"
CARD = "README.md"
LICENCE = re.compile(r"(LICEN[CS]E|NOTICE|USE_POLICY)(\.(txt|md))?", re.IGNORECASE)
# Of what the card may show or link to.
CARD_SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".md", ".csv", ".json")
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)|\b(?:src|href)=[\"']([^\"']+)")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")


@dataclass(frozen=True)
class Selection:
    """What a push takes.

    Attributes:
        files: the file for each path in the repository.
        left_out: the reason for each path, or folder with a slash at its end, that stays behind.
        config: the contents of config.json.
    """

    files: dict[str, Path]
    left_out: dict[str, str]
    config: dict[str, Any]


def select_files(folder: Path) -> Selection:
    """Select from a converted checkpoint.

    Raises:
        FileNotFoundError: there is no such folder, or a file that loading needs is missing.
        ValueError: it is no converted checkpoint, its weights are damaged or lack the encoder, or a file that loading
            needs is a link out of the folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    config = _read_config(folder)
    auto_maps = [config["auto_map"], _read_json(folder, "tokenizer_config.json").get("auto_map") or {}]
    needed = ["tokenizer.json", *_module_files(folder, auto_maps), *_weight_files(folder, config)]
    if subfolder := config.get("adapter_subfolder"):
        needed += [f"{subfolder}/{name}" for name in ADAPTER_FILES]
    for path in needed:
        _check_file(folder, path)
    present, left_out = _walk(folder)
    optional = {path for path in present if is_loaded(path) and not path.endswith((".py", ".safetensors"))}
    optional -= {SAFE_WEIGHTS_INDEX_NAME, *(path for path in optional if path.endswith(ADAPTER_FILES))}
    shown = _shown_by_card(folder, present)
    chosen = {*needed, *optional, *shown, *(path for path in present if LICENCE.fullmatch(path))}
    left_out |= {path: _reason(path) for path in present if path not in chosen}
    return Selection({path: folder / path for path in sorted(chosen)}, _by_folder(left_out, chosen), config)


def is_loaded(path: str) -> bool:
    """Whether `from_pretrained` may read a file of this name in a SemToken repository."""
    pure = PurePosixPath(path)
    if pure.name in ADAPTER_FILES:
        return len(pure.parts) <= 2
    if path == CUSTOM_GENERATE:
        return True
    if len(pure.parts) == 2:
        return pure.parts[0] == TEMPLATES and pure.suffix == ".jinja"
    known = (*CONFIGURATION_FILES, *TOKENIZER_FILES, SAFE_WEIGHTS_INDEX_NAME)
    return len(pure.parts) == 1 and (path in known or pure.suffix in (".py", ".safetensors"))


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    _check_file(folder, name)
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{name} in {folder} is no JSON object: convert or save the checkpoint again")
    return content


def _read_config(folder: Path) -> dict[str, Any]:
    config = _read_json(folder, "config.json")
    auto_map = config.get("auto_map") or {}
    if not str(config.get("model_type")).startswith("semtoken_") or "AutoModelForCausalLM" not in auto_map:
        raise ValueError(
            f"{folder} is no converted checkpoint (model_type {config.get('model_type')!r}, auto_map {auto_map}): "
            "convert one with `semtoken convert`"
        )
    return config


def _check_file(folder: Path, path: str) -> None:
    if not (folder / path).is_file():
        raise FileNotFoundError(f"{folder} lacks {path}, which loading needs: convert or save the checkpoint again")
    if not _is_inside(folder / path, folder):
        raise ValueError(f"{path} in {folder} is a link to outside the folder: copy the file there")


def _is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _module_files(folder: Path, auto_maps: list[dict[str, Any]]) -> list[str]:
    """The modules that the auto_maps name, and those that they import."""
    classes = [
        c for m in auto_maps for value in m.values() for c in (value if isinstance(value, list) else [value]) if c
    ]
    if foreign := [name for name in classes if "--" in name]:
        raise ValueError(f"auto_map of {folder} points to code of another repository ({foreign[0]}): save it again")
    found = sorted(needed_modules(folder, (f"{name.split('.')[0]}.py" for name in classes)))
    for path in found:
        _check_file(folder, path)
    return found


def _weight_files(folder: Path, config: dict[str, Any]) -> list[str]:
    """The files that hold the weights, read by their headers."""
    if (folder / SAFE_WEIGHTS_NAME).exists() and (folder / SAFE_WEIGHTS_INDEX_NAME).exists():
        raise ValueError(f"{folder} holds {SAFE_WEIGHTS_NAME} and {SAFE_WEIGHTS_INDEX_NAME}: keep the one that counts")
    stored = find_tensors(folder)
    encoder = [name for name in stored if "semantic_encoder." in name]
    if not encoder and config.get("segmentation_mode") != "uniform":
        raise ValueError(f"the weights in {folder} hold no semantic encoder: convert the checkpoint again")
    if len(encoder) == len(stored):
        raise ValueError(f"the weights in {folder} hold no language model: convert the checkpoint again")
    files = {tensor.file.name for tensor in stored.values()}
    return sorted(files | ({SAFE_WEIGHTS_INDEX_NAME} if (folder / SAFE_WEIGHTS_INDEX_NAME).exists() else set()))


def _walk(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Ordinary files below the folder, and what is hidden or a link to outside with the reason."""
    present, left_out = [], {}
    for root, folders, files in os.walk(folder):
        for name in sorted(folders + files):
            path = Path(root, name)
            inner = path.relative_to(folder).as_posix()
            is_folder = name in folders
            if name.startswith("."):
                left_out[inner + "/" * is_folder] = "hidden"
            elif name == "__pycache__":
                left_out[inner + "/"] = "cache"
            elif path.is_symlink() and (is_folder or not _is_inside(path, folder)):
                left_out[inner] = "a link to a folder" if is_folder else "a link to outside the folder"
            elif not is_folder:
                present.append(inner)
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
    return present, left_out


def _shown_by_card(folder: Path, present: list[str]) -> set[str]:
    """The card, what it shows or links to below the folder, and what those documents show."""
    waiting, found = [CARD], set[str]()
    while waiting:
        path = waiting.pop()
        if path in found or path not in present:
            continue
        found.add(path)
        if path.endswith(".md"):
            links = (a or b for a, b in LINK.findall((folder / path).read_text(encoding="utf-8")))
            inner = (os.path.normpath(PurePosixPath(path).parent / link.split("#")[0]) for link in links)
            waiting += [Path(link).as_posix() for link in inner if link.endswith(CARD_SUFFIXES)]
    return found


def _reason(path: str) -> str:
    suffix = PurePosixPath(path).suffix
    if suffix in PICKLE_SUFFIXES:
        return "may be pickle, which runs code when it is loaded"
    if suffix == ".safetensors":
        return "no weights that config.json and the index load"
    if suffix == ".py":
        return "no module that auto_map needs"
    return "not read by from_pretrained, not shown by the card"


def _by_folder(left_out: dict[str, str], chosen: set[str]) -> dict[str, str]:
    """One entry for a folder nothing of which is chosen and all of which stays behind."""
    kept = {path.split("/")[0] for path in chosen}
    rows: dict[str, list[str]] = {}
    for path, reason in left_out.items():
        top = path.split("/")[0]
        rows.setdefault(path if top in kept or "/" not in path else f"{top}/", []).append(reason)
    return {path: ", ".join(dict.fromkeys(reasons)) for path, reasons in sorted(rows.items())}


__all__ = ["CARD", "Selection", "is_loaded", "select_files"]
