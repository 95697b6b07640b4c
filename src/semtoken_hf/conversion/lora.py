"""A PEFT adapter as the source of a conversion: merged into its base model and written as a plain checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import is_peft_available

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter and no model of its own."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def base_of(folder: Path) -> str:
    """Folder or Hub id of the model that an adapter belongs to.

    Raises:
        ValueError: the adapter does not name one.
    """
    base = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{folder / ADAPTER_CONFIG} names no `base_model_name_or_path`: write the base model there")
    return base


def write_merged(adapter: Path, base: Path, folder: Path, dtype: str | None) -> None:
    """Write the plain checkpoint of a base model with the adapter in its weights.

    Args:
        adapter: folder of the adapter; its tokenizer is taken where it has one.
        base: folder of the model.
        folder: an empty folder.
        dtype: "float32", "bfloat16" or None, the base model's own. A model of this dtype is built in memory.

    Raises:
        FileNotFoundError: the adapter's weights are not there as safetensors.
        ImportError: PEFT is not installed.
        ValueError: the adapter does not fit the base model.
    """
    if not is_peft_available():
        raise ImportError("merging an adapter needs PEFT: pip install 'semtoken-hf[adapt]'")
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise FileNotFoundError(f"{adapter} holds no {ADAPTER_WEIGHTS}: save the adapter again, as safetensors")
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto" if dtype is None else getattr(torch, dtype))
    try:
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the adapter in {adapter} cannot be merged into {base}: {error}") from error
    merged.save_pretrained(folder)
    has_tokenizer = (adapter / "tokenizer.json").is_file()
    AutoTokenizer.from_pretrained(adapter if has_tokenizer else base).save_pretrained(folder)


__all__ = ["base_of", "is_adapter", "write_merged"]
