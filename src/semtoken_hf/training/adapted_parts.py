"""What an adaptation adds to the checkpoint it came from, as a small folder, and the way back.

Everything else of an adapted checkpoint is the converted one: merger and adapter alone fit into a repository.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..adapter_semtoken import load_adapter
from ..conversion.staging import staged_folder

MERGER, FIELDS = "merger.safetensors", "fields.json"
# Of the configuration: what says how an adapted checkpoint reads.
OF_ADAPTATION = ("merge_mode", "merger_base", "merger_rank", "max_span_length", "adapted_for")


def extract_parts(adapted: str | os.PathLike, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write merger, adapter and fields of an adapted checkpoint into `folder`, in `dtype`.

    Args:
        adapted: folder of a checkpoint that `semtoken adapt` wrote with `merger` or `lora`.
        folder: written whole or not at all.

    Raises:
        ValueError: the checkpoint has no learned merger, or all of it was trained.
    """
    adapted = Path(adapted)
    config = AutoConfig.from_pretrained(adapted)
    if config.merge_mode != "learned" or (config.adapted_for or {}).get("trainable") == "full":
        raise ValueError(f"{adapted} is no checkpoint that was adapted by a merger or an adapter alone")
    merger: dict[str, torch.Tensor] = {}
    for file in sorted(adapted.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            merger |= {k: weights.get_tensor(k).to(dtype) for k in weights.keys() if "learned_merger." in k}  # noqa: SIM118
    with staged_folder(folder, overwrite=True) as staged:
        if config.adapter_subfolder is not None:
            target = staged / config.adapter_subfolder
            shutil.copytree(adapted / config.adapter_subfolder, target)
            for file in target.glob("*.safetensors"):
                save_file({k: v.to(dtype) for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
        fields: dict[str, Any] = {name: getattr(config, name) for name in (*OF_ADAPTATION, "adapter_subfolder")}
        (staged / FIELDS).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
        save_file(merger, staged / MERGER, metadata={"format": "pt"})


def apply_parts(converted: str | os.PathLike, parts: Path, output: Path) -> None:
    """Write the adapted checkpoint that `parts` and the converted checkpoint they were trained on make.

    Raises:
        FileNotFoundError: `parts` is no folder of `extract_parts`.
        RuntimeError: the merger does not fit the checkpoint.
    """
    if not (parts / FIELDS).is_file():
        raise FileNotFoundError(f"{parts} holds no {FIELDS}: it is no folder of an adaptation's parts")
    fields = json.loads((parts / FIELDS).read_text(encoding="utf-8"))
    subfolder = fields.pop("adapter_subfolder")
    model: Any = AutoModelForCausalLM.from_pretrained(converted, dtype="auto", **fields)
    merger = {k.rsplit("learned_merger.", 1)[1]: v.to(model.dtype) for k, v in load_file(parts / MERGER).items()}
    model.base_model.learned_merger.load_state_dict(merger)
    if subfolder is not None:
        model.config.adapter_subfolder = subfolder
        load_adapter(model, parts)
    with staged_folder(output, overwrite=True) as staged:
        AutoTokenizer.from_pretrained(converted).save_pretrained(staged)
        model.save_pretrained(staged)


__all__ = ["apply_parts", "extract_parts"]
