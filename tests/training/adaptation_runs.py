"""Tiny adaptations: a converted checkpoint, a text, and options that make a run take a second."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch

from semtoken_hf.training.adaptation_arguments import AdaptationArguments, AdaptationTrainingArguments
from tests.fixtures.text import PROSE
from tests.fixtures.tiny import tiny_model, tiny_tokenizer

MODEL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "target_ratio": 3.0,
    "merger_rank": 8,
}
OPTIONS = {
    "trainable": "merger",
    "held_out_share": 0.3,
    "chunk_length": 16,
    "sequence_length": 80,
    "span_lengths": [1, 2, 4],
    "merger_only_share": 0.0,
    "context_length": 64,
    "min_context_length": 48,
    "target_length": 16,
    "ratios": [2.0, 4.0],
    "lora_rank": 4,
    "lora_alpha": 8,
    "evaluation_windows": 2,
}
TRAINING = {
    "max_steps": 8,
    "per_device_train_batch_size": 2,
    "bf16": False,
    "eval_steps": 4,
    "save_steps": 4,
    "logging_steps": 1,
    "warmup_steps": 1,
    "disable_tqdm": True,
}


def make_inputs(folder: Path, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """`folder` with a checkpoint and a text."""
    tiny_model(dtype=dtype, **{**MODEL, **fields}).save_pretrained(folder / "checkpoint")
    tiny_tokenizer().save_pretrained(folder / "checkpoint")
    (folder / "text").mkdir()
    documents = [PROSE.replace("Bennet", f"Bennet{i}") for i in range(12)]
    (folder / "text" / "novel.txt").write_text("\n\n\n".join(documents))
    return folder


def options(
    inputs: Path, output_dir: Path, arguments: dict[str, Any] | None = None, **training: Any
) -> tuple[AdaptationArguments, AdaptationTrainingArguments]:
    """What `adapt` takes, with some arguments instead of those above."""
    paths = {"checkpoint": str(inputs / "checkpoint"), "text": str(inputs / "text")}
    return (
        AdaptationArguments(**{**paths, **OPTIONS, **(arguments or {})}),
        AdaptationTrainingArguments(**{"output_dir": str(output_dir), **TRAINING, **training}),
    )


def curve(output_dir: Path) -> list[dict[str, float]]:
    """The rows of `curve.csv`."""
    with (output_dir / "curve.csv").open() as handle:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(handle)]
