"""Tensors of a checkpoint, found by the headers of its files and copied from file to file, shard by shard."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming, revert_weight_conversion

from .pickled_weights import PICKLE, PICKLE_INDEX, REFUSED, read_pickle

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its file, its name there, shape, dtype and size in bytes."""

    file: Path
    key: str
    shape: torch.Size
    dtype: torch.dtype
    nbytes: int


def find_tensors(folder: Path, allow_pickle: bool = False) -> dict[str, StoredTensor]:
    """Every tensor of a single-file or sharded checkpoint, by name, in file order.

    Args:
        folder: of the checkpoint; safetensors win where it holds pickle files, too.
        allow_pickle: read `pytorch_model.bin` where there are no safetensors, tensors alone.

    Raises:
        FileNotFoundError: there are no weights that may be read, or a file of the index is missing.
        ValueError: a file is damaged, or lacks a tensor that the index lists.
    """
    for single, index in ((WEIGHTS, INDEX), (PICKLE, PICKLE_INDEX))[: 1 + allow_pickle]:
        if (folder / single).is_file():
            return _tensors_of_file(folder / single)
        if (folder / index).is_file():
            return _tensors_of_index(folder, index)
    raise FileNotFoundError(f"{folder} holds no {WEIGHTS}" + (f" and no {PICKLE}" if allow_pickle else f"; {REFUSED}"))


def _tensors_of_index(folder: Path, index: str) -> dict[str, StoredTensor]:
    weight_map = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
    found: dict[str, StoredTensor] = {}
    for name in dict.fromkeys(weight_map.values()):
        if Path(name).name != name:
            raise ValueError(f"{index} in {folder} names {name!r}, which is no file of that folder")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} lacks {name}, which {index} lists; download the checkpoint again")
        found |= {key: t for key, t in _tensors_of_file(folder / name).items() if weight_map.get(key) == name}
    if lost := sorted(weight_map.keys() - found.keys()):
        raise ValueError(f"{index} in {folder} lists tensors that its files do not hold: {shortened(lost)}")
    return found


def _tensors_of_file(file: Path) -> dict[str, StoredTensor]:
    # Either way a tensor is a view of the mapped file, so that nothing is read here.
    if file.suffix == ".bin":
        return {name: _stored(file, name, tensor) for name, tensor in read_pickle(file).items()}
    try:
        with safe_open(file, "pt") as handle:
            return {name: _stored(file, name, handle.get_tensor(name)) for name in handle.offset_keys()}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or incomplete; download it again ({error})") from error


def _stored(file: Path, name: str, tensor: Tensor) -> StoredTensor:
    return StoredTensor(file, name, tensor.shape, tensor.dtype, tensor.nbytes)


def rename_as_loaded(stored: dict[str, StoredTensor], model_class: type[PreTrainedModel]) -> dict[str, StoredTensor]:
    """The tensors under the names that `model_class` gives them when it loads the checkpoint.

    Raises:
        ValueError: Transformers would change the tensors, too, and not only their names.
    """
    changes = get_checkpoint_conversion_mapping(model_class.__name__)
    if changes is None:
        changes = get_checkpoint_conversion_mapping(model_class.config_class.model_type) or []  # type: ignore[union-attr]
    if any(type(change) is not WeightRenaming for change in changes):
        raise ValueError(f"a stored {model_class.__name__} has another layout than a loaded one and cannot be copied")
    renamed = {}
    for name, tensor in stored.items():
        for change in changes:
            name = change.rename_source_key(name)[0]
        renamed[name] = tensor
    return renamed


def rename_as_stored(stored: dict[str, StoredTensor], model: PreTrainedModel) -> dict[str, StoredTensor]:
    """The opposite of `rename_as_loaded`: under the names that `model.save_pretrained` writes."""
    renamed = {}
    for name, tensor in stored.items():
        (key,) = revert_weight_conversion(model, {name: torch.empty(0)})
        renamed[key] = tensor
    return renamed


def shortened(names: list[str]) -> str:
    """The first three names and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def write_weights(
    folder: Path,
    stored: dict[str, StoredTensor],
    added: dict[str, Tensor],
    max_shard_size: str | int,
    progress: bool,
) -> None:
    """Copy the stored tensors into shards, then `added`, if any, into a shard of its own, and write the index.

    Args:
        folder: where the shards go.
        stored: tensors to copy; bits and dtype stay.
        added: further tensors, in memory.
        max_shard_size: largest file of stored tensors, such as "5GB"; one shard at a time is in memory.
        progress: show a bar over the bytes.

    Raises:
        OSError: a file cannot be written.
    """
    split = split_state_dict_into_shards_factory(
        {name: t.nbytes for name, t in stored.items()},
        get_storage_size=lambda nbytes: nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    shards = [*split.filename_to_tensors.values(), *([list(added)] if added else [])]
    total = sum(t.nbytes for t in stored.values()) + sum(t.nbytes for t in added.values())
    weight_map: dict[str, str] = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc="write weights", disable=not progress) as bar:
        for number, names in enumerate(shards, 1):
            tensors = added if added and number == len(shards) else _read_tensors(stored, names)
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            try:
                save_file(tensors, folder / file, metadata={"format": "pt"})
            except SafetensorError as error:  # a full disk, say
                raise OSError(f"{folder / file} could not be written: {error}") from error
            weight_map |= dict.fromkeys(tensors, file)
            bar.update(sum(t.nbytes for t in tensors.values()))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for file in set(weight_map.values()):
        # safetensors writes for the owner alone; a server often runs as somebody else.
        shutil.copymode(folder / INDEX, folder / file)


def _read_tensors(stored: dict[str, StoredTensor], names: list[str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in dict.fromkeys(stored[name].file for name in names):
        if file.suffix == ".bin":
            held = read_pickle(file)
            # Copied: tensors of such a file may share memory or lie transposed, which safetensors cannot say.
            copies = {name: held[stored[name].key] for name in names if stored[name].file == file}
            tensors |= {name: t.clone(memory_format=torch.contiguous_format) for name, t in copies.items()}
            continue
        with safe_open(file, "pt") as handle:
            tensors |= {name: handle.get_tensor(stored[name].key) for name in names if stored[name].file == file}
    return tensors


__all__ = ["StoredTensor", "find_tensors", "rename_as_loaded", "rename_as_stored", "shortened", "write_weights"]
