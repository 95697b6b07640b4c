"""Where a conversion reads from: a folder, or a snapshot of a Hub repository, without its pickle weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from .pickled_weights import PICKLE_FILES
from .weights import INDEX

HUB_FILES = (
    *("config.json", "generation_config.json", "model*.safetensors", INDEX, "tokenizer*", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template*", "additional_chat_templates/*", "vocab*", "merges.txt", "sentencepiece*"),
)


def resolve_folder(name: str | os.PathLike, revision: str | None = None, allow_pickle: bool = False) -> Path:
    """The local folder `name`, or a snapshot of the Hub repository `name`.

    Args:
        allow_pickle: fetch pickle weights, too, where the repository has no safetensors.
    """
    if Path(name).is_dir():
        return Path(name).absolute()
    try:
        folder = Path(snapshot_download(str(name), revision=revision, allow_patterns=list(HUB_FILES)))
        if allow_pickle and not any(folder.glob("*.safetensors")):
            patterns = [*HUB_FILES, *PICKLE_FILES]
            # Of the same commit, whatever the branch points to by now.
            folder = Path(snapshot_download(str(name), revision=folder.name, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"'{name}' is neither a folder nor a Hub repository that can be read: {error}"
        ) from error
    return folder


def check_semtoken(config: Any, checkpoint: str | os.PathLike) -> None:
    """Raise ValueError for the configuration of a plain checkpoint."""
    if not hasattr(config, "segmentation_mode"):
        raise ValueError(
            f"{checkpoint} is a plain {config.model_type!r} checkpoint: `semtoken convert` makes a SemToken one of it"
        )


def read_model_type(folder: Path) -> str:
    """`model_type` of a folder's config.json; empty if it names none."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: it is not a Transformers checkpoint")
    return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type") or ""


__all__ = ["read_model_type", "resolve_folder"]
