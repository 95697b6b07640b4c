"""The benchmark's random models and text, with one encoder or the other and any field of the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..benchmarking import models
from ..benchmarking.shapes import ModelShape
from ..benchmarking.workloads import Batch, batch_of_lengths

ROOT = Path(__file__).resolve().parents[3]
CHECKPOINT, TEXT = ROOT / "model_cards" / "semtoken-llama-tiny", ROOT / "scripts" / "quickstart_chapter.txt"
# The longest sequence of any model here.
POSITIONS = 2**21
# None: the checkpoint's own table.
ENCODERS: dict[str, dict[str, Any] | None] = {
    "static": None,
    "transformer": {
        "model_type": "bert",
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 256,
        "max_position_embeddings": 128,
    },
}


def build_model(
    shape: ModelShape,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    encoder: str = "static",
    attn_implementation: str = "sdpa",
    **fields: Any,
) -> Any:
    """`benchmarking.models.build_model` with the fields and the tokenizer's vocabulary of `CHECKPOINT`.

    Args:
        encoder: "static", or "transformer" with random weights: its plans cost what real ones cost, and mean nothing.
    """
    torch.manual_seed(0)
    planner = models.load_planner(str(CHECKPOINT), ENCODERS[encoder])
    return models.build_model(shape, device, dtype, planner, POSITIONS, attn_implementation, **fields)


@cache
def _text() -> Tensor:
    return models.text_ids(str(CHECKPOINT), str(TEXT))


def prompts(lengths: Sequence[int], device: torch.device | str = "cpu") -> Batch:
    """A chapter of running text, repeated: left-padded rows of so many tokens."""
    return batch_of_lengths(_text(), lengths, device)
