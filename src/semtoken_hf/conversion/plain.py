"""Back from a SemToken checkpoint to the plain one inside it, for engines that know the family and no remote code."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedTokenizerFast

from ..configuration_semtoken import SemTokenConfigMixin
from .checkpoint import causal_lm_class, check_tensors
from .source import FAMILY_PREFIX, read_model_type, resolve_folder
from .staging import check_output, remove_stale, staged_folder
from .weights import find_tensors, rename_as_stored, write_weights

# Of the tensors that the plain model has not.
OWN_PARTS = (".semantic_encoder.", ".learned_merger.")


def export_plain(
    checkpoint: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    revision: str | None = None,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write the plain model of a SemToken checkpoint: its weights unchanged, no encoder, merger, adapter or code.

    Args:
        checkpoint: folder or Hub id.
        output_dir: the new folder.
        revision: revision of `checkpoint` on the Hub.
        max_shard_size: largest weight file, such as "5GB", and the memory that writing needs.
        overwrite: replace `output_dir`, at the very end, if it is a checkpoint.
        progress: show a bar.

    Returns:
        `output_dir`.

    Raises:
        FileExistsError: `output_dir` exists.
        FileNotFoundError: no such checkpoint, or files of it are missing.
        ValueError: the checkpoint is not SemToken's, is quantised, or lacks tensors.
    """
    output = Path(output_dir).resolve()
    remove_stale(output)
    source = resolve_folder(checkpoint, revision)
    check_output(output, overwrite, [source])
    config = read_plain_part(source)
    stored = {
        name: tensor
        for name, tensor in find_tensors(source).items()
        if not any(part in f".{name}" for part in OWN_PARTS)
    }
    with torch.device("meta"):
        model = causal_lm_class(config)(config)
    check_tensors(model, stored, {})
    with staged_folder(output, overwrite) as folder:
        config.save_pretrained(folder)
        save_plain_tokenizer(source, folder)
        if (source / "generation_config.json").is_file():
            shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")
        write_weights(folder, rename_as_stored(stored, model), {}, max_shard_size, progress)
    return output


def read_plain_part(folder: Path) -> PreTrainedConfig:
    """The family's own configuration inside a SemToken one."""
    model_type = read_model_type(folder)
    plain_type = model_type.removeprefix(FAMILY_PREFIX)
    if plain_type == model_type or model_type not in CONFIG_MAPPING:
        raise ValueError(f"{folder} has model_type {model_type!r}: it is no SemToken checkpoint")
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if stored.get("quantization_config") is not None:
        raise ValueError(f"{folder} is quantised; export the unquantised checkpoint and quantise the result")
    return plain_part(stored)


def plain_part(stored: dict[str, Any]) -> PreTrainedConfig:
    """The family's own configuration, from the fields of a SemToken one."""
    plain_type = stored["model_type"].removeprefix(FAMILY_PREFIX)
    dropped = {field.name for field in fields(SemTokenConfigMixin)}
    dropped |= {"model_type", "auto_map", "architectures", "transformers_version", "_name_or_path"}
    config = CONFIG_MAPPING[plain_type](**{name: value for name, value in stored.items() if name not in dropped})
    config.architectures = [causal_lm_class(config).__name__]
    return config


def save_plain_tokenizer(source: str | os.PathLike, folder: Path) -> None:
    """Write the tokenizer of a SemToken checkpoint, a folder or a Hub id, as one that needs no code of ours."""
    PreTrainedTokenizerFast.from_pretrained(source).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content.pop("auto_map", None)
    # The name that every release of Transformers knows.
    content["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


__all__ = ["export_plain", "plain_part", "read_plain_part", "save_plain_tokenizer"]
