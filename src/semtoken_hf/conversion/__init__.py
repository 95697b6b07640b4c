"""From a plain checkpoint and an encoder to one SemToken folder; never imported by the modules that ship with it."""

from __future__ import annotations

from ..tokenization_semtoken_fast import special_token_ids
from .checkpoint import convert_checkpoint
from .distillation import distill_static_encoder
from .vocabulary import digit_token_ids, rare_token_ids, token_texts, transplant_embeddings

__all__ = [
    "convert_checkpoint",
    "digit_token_ids",
    "distill_static_encoder",
    "rare_token_ids",
    "special_token_ids",
    "token_texts",
    "transplant_embeddings",
]
