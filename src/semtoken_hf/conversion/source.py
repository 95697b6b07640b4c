"""Where a conversion reads from: a plain checkpoint in a folder or on the Hub, or what has to become one first.

A GGUF file is dequantised and a PEFT adapter merged, each into a folder beside the output that is gone at the end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import CONFIG_MAPPING

from .gguf import download_gguf, find_gguf, write_plain_of_gguf
from .lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, base_of, is_adapter, write_merged
from .pickled_weights import PICKLE_FILES
from .staging import scratch_folder
from .weights import INDEX

# Of the model types whose configuration, base model and language model `semtoken_hf` registers.
FAMILY_PREFIX = "semtoken_"
DTYPES = ("float32", "bfloat16")

HUB_FILES = (
    *("config.json", "generation_config.json", "model*.safetensors", INDEX, "tokenizer*", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template*", "additional_chat_templates/*", "vocab*", "merges.txt", "sentencepiece*"),
    *(ADAPTER_CONFIG, ADAPTER_WEIGHTS),
)


@contextmanager
def plain_source(
    model: str | os.PathLike,
    output: Path,
    revision: str | None = None,
    allow_pickle: bool = False,
    gguf_file: str | None = None,
    dtype: str | None = None,
) -> Iterator[Path]:
    """The folder of a plain checkpoint, for the length of the block.

    Args:
        model: folder or Hub id of a plain checkpoint or of a PEFT adapter, or a GGUF file or a folder with one.
        output: of the conversion; what has to be written first goes beside it.
        revision: of `model` on the Hub.
        allow_pickle: see `resolve_folder`.
        gguf_file: which file of the folder or Hub repository `model`.
        dtype: of dequantised or merged weights; None: float32 of a GGUF file, the base model's behind an adapter.

    Raises:
        FileNotFoundError, ImportError, ValueError: see `gguf`, `lora` and `resolve_folder`; `dtype` is given for a
            plain checkpoint, whose weights keep theirs.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"`dtype` must be one of {list(DTYPES)} or None, got {dtype!r}")
    path = Path(model)
    file = find_gguf(path, gguf_file) if path.exists() else None
    if not path.exists() and gguf_file is not None:
        file = download_gguf(str(model), gguf_file, revision)
    if file is not None:
        with scratch_folder(output) as folder:
            write_plain_of_gguf(file, folder, dtype or "float32", convertible_types())
            yield folder
        return
    source = resolve_folder(model, revision, allow_pickle)
    if is_adapter(source):
        base = resolve_folder(base_of(source), allow_pickle=allow_pickle)
        with scratch_folder(output) as folder:
            write_merged(source, base, folder, dtype)
            yield folder
        return
    if dtype is not None:
        raise ValueError("`dtype` is for GGUF files and adapters; the weights of a plain checkpoint keep theirs")
    yield source


def convertible_types() -> list[str]:
    """The model types of the families that SemToken knows, sorted."""
    families = (name.removeprefix(FAMILY_PREFIX) for name in CONFIG_MAPPING if name.startswith(FAMILY_PREFIX))
    return sorted(name for name in families if name in CONFIG_MAPPING)  # not the encoder of kind static


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


__all__ = [
    "DTYPES",
    "FAMILY_PREFIX",
    "check_semtoken",
    "convertible_types",
    "plain_source",
    "read_model_type",
    "resolve_folder",
]
