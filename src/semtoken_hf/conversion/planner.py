"""A planner for a vocabulary and an encoder, without any language model: to look at an encoder before converting."""

from __future__ import annotations

import os
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..semantic_encoder import SemanticEncoder
from ..tokenization_semtoken_fast import SpanPlanner, SpanPlannerConfig
from .encoder import build_encoder
from .source import resolve_folder
from .text_markers import text_markers


def planner_on_vocabulary(
    tokenizer: PreTrainedTokenizerBase,
    encoder: str | os.PathLike,
    encoder_kind: str = "transformer",
    static_dim: int = 64,
    encoder_layers: int | None = None,
    encoder_dtype: str = "auto",
    **config_fields: Any,
) -> SpanPlanner:
    """The planner that a conversion with this encoder would ship.

    Args:
        tokenizer: fast tokenizer of the language model.
        encoder: folder or Hub id of a transformer encoder.
        encoder_kind: "transformer" or "static".
        static_dim: width of the static table.
        encoder_layers: the encoder's first layers that are read; None: all.
        encoder_dtype: of its layers.
        config_fields: compression fields, as in `SemTokenConfigMixin`.
    """
    size = len(tokenizer)
    encoder_config, tensors = build_encoder(
        resolve_folder(encoder),
        encoder_kind,
        tokenizer,
        size,
        static_dim,
        trust_remote_code=False,
        progress=True,
        layers=encoder_layers,
    )
    config_fields.setdefault("text_markers", text_markers(tokenizer, size))
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = SpanPlannerConfig(
        vocab_size=size, encoder_config=encoder_config, encoder_dtype=encoder_dtype, **special, **config_fields
    )
    semantic_encoder = SemanticEncoder(config)
    semantic_encoder.encoder.load_state_dict(tensors)
    return SpanPlanner(config, semantic_encoder)
