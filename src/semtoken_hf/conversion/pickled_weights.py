"""Pickle weights (`pytorch_model.bin`), read only where the caller says so, and then by PyTorch's restricted reader.

`torch.load(weights_only=True)` builds tensors and plain containers and calls nothing else that a file names.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor

PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
# Of a snapshot from the Hub.
PICKLE_FILES = ("pytorch_model*.bin", PICKLE_INDEX)
RESAVE = "write them as safetensors first: `AutoModel...from_pretrained(folder).save_pretrained(new_folder)`"
REFUSED = (
    f"pickle weights are not read, since such files can carry code: {RESAVE}; or let the conversion read tensors alone "
    "from them with `allow_pickle=True` (`--allow-pickle`)"
)


def holds_pickle(folder: Path) -> bool:
    """Whether the folder has pickle weights."""
    return (folder / PICKLE).is_file() or (folder / PICKLE_INDEX).is_file()


def read_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickle file by name, mapped from the disk: memory is taken as they are used.

    Raises:
        ValueError: the file is damaged, holds anything but tensors, or is older than PyTorch 1.6, whose format cannot
            be mapped.
    """
    if not zipfile.is_zipfile(file):
        raise ValueError(f"{file} is damaged, or in the format of PyTorch before 1.6, which cannot be mapped: {RESAVE}")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file} holds more than tensors and was not read; do not trust it ({error})") from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{file} is damaged or incomplete; download it again ({error})") from error
    is_plain = isinstance(content, dict) and all(isinstance(name, str) for name in content)
    if not is_plain or not all(isinstance(t, Tensor) and t.layout is torch.strided for t in content.values()):
        raise ValueError(f"{file} is no plain dict of dense tensors by name: {RESAVE}")
    return {name: tensor.detach() for name, tensor in content.items()}


__all__ = ["PICKLE", "PICKLE_FILES", "PICKLE_INDEX", "REFUSED", "RESAVE", "holds_pickle", "read_pickle"]
