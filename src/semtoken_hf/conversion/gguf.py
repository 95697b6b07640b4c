"""A GGUF file as the source of a conversion: dequantised once by Transformers' own loader into a plain checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.import_utils import is_gguf_available

SUFFIX = ".gguf"


def find_gguf(model: Path, gguf_file: str | None = None) -> Path | None:
    """The GGUF file that `model` is, or that lies in it where it holds no other checkpoint; None if there is none.

    Args:
        model: a file or a folder.
        gguf_file: which file of the folder.

    Raises:
        FileNotFoundError: `gguf_file` is not in the folder.
        ValueError: the folder holds several, and `gguf_file` does not say which.
    """
    if model.is_file():
        if model.suffix.lower() != SUFFIX:
            raise ValueError(f"{model} is no folder and no {SUFFIX} file: give the folder of a checkpoint")
        return model
    if gguf_file is not None:
        if not (model / gguf_file).is_file():
            raise FileNotFoundError(f"{model} holds no file {gguf_file!r}: `gguf_file` (--gguf-file) names one of it")
        return model / gguf_file
    files = sorted(model.glob(f"*{SUFFIX}"))
    if not files or (model / "config.json").is_file():
        return None
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{model} holds several GGUF files: choose one with `gguf_file` (--gguf-file): {names}")
    return files[0]


def download_gguf(repository: str, gguf_file: str, revision: str | None) -> Path:
    """One GGUF file of a Hub repository."""
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=[gguf_file]))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"'{repository}' is no Hub repository that can be read: {error}") from error
    return folder / gguf_file


def write_plain_of_gguf(file: Path, folder: Path, dtype: str, families: list[str]) -> None:
    """Write the plain checkpoint of a GGUF file: weights in `dtype`, configuration, generation settings, tokenizer.

    Args:
        file: the GGUF file.
        folder: an empty folder.
        dtype: "float32" or "bfloat16". A model of this dtype is built in memory.
        families: model types that can be converted; the file's is checked before anything is dequantised.

    Raises:
        ImportError: the package `gguf` is not installed.
        ValueError: the file is damaged, or of an architecture that Transformers or this package does not know.
    """
    if not is_gguf_available():
        raise ImportError("reading a GGUF file needs the package gguf: pip install 'semtoken-hf[gguf]'")
    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    with _saying_what_is_wrong(file):
        model_type = AutoConfig.from_pretrained(**place).model_type
    if model_type not in families:
        raise ValueError(f"{file.name} has model_type {model_type!r}; only {families} can be converted")
    with _saying_what_is_wrong(file):
        model: Any = AutoModelForCausalLM.from_pretrained(**place, dtype=getattr(torch, dtype))
        tokenizer = AutoTokenizer.from_pretrained(**place)
    for name in ("quantization_config", "_model_name_or_path"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.config.dtype = getattr(torch, dtype)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    # And not `model.save_pretrained`, which takes the model for a quantised one and refuses.
    tied = list(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else None
    save_torch_state_dict(model.state_dict(), folder, shared_tensors_to_discard=tied)
    tokenizer.save_pretrained(folder)


@contextmanager
def _saying_what_is_wrong(file: Path) -> Iterator[None]:
    """A ValueError that names the file, of whatever kind the reader's own is."""
    try:
        yield
    except (ImportError, OSError):
        raise
    except Exception as error:
        if "architecture" in str(error):
            raise ValueError(f"{file.name} cannot be converted: {error}") from error
        raise ValueError(f"{file} is damaged or no GGUF file; download it again ({error})") from error


__all__ = ["download_gguf", "find_gguf", "write_plain_of_gguf"]
