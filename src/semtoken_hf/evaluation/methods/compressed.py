"""SemToken itself, with some fields of the configuration changed for the call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ...cache_semtoken import SemTokenCache
from ..continuation import Prefill
from ..prompts import Prompt
from ..relevance import relevance_from
from .base import Method

# Fields that the encoder reads once, when it is built.
ENCODER_FIELDS = {"fingerprint_radius": "radius", "encoder_window": "window", "encoder_overlap": "overlap"}


@dataclass
class Compressed(Method):
    """The checkpoint's own compression stage inside `forward`.

    Attributes:
        fields: of the configuration, changed while a prompt is read.
        marks_question: tell the model where the question is, which it otherwise has to find.
        relevance: of `relevance_from`.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    marks_question: bool = False
    relevance: str | None = None

    def unfit(self, model: Any) -> str | None:
        if self.fields.get("merge_mode") == "learned" and model.base_model.learned_merger is None:
            return "the checkpoint has no learned merger; see scripts/adapt.py"
        if "merge_mode" in self.fields and model.config.adapter_subfolder is not None:
            return "the checkpoint has an adapter, which acts wherever something merged; give the one before adaptation"
        if self.fields and all(getattr(model.config, name) == value for name, value in self.fields.items()):
            return "these are the checkpoint's own fields: it is read as SemToken"
        return None

    @torch.no_grad()
    def read(self, model: Any, prompt: Prompt, slots: int) -> Prefill:
        # Without a budget, the thresholds decide.
        ratio, most = (1.0, slots) if self.has_budget else (None, None)
        fields = {"target_ratio": ratio, "max_slots": most, **self.fields}
        with changed_fields(model, **fields), relevance_from(self.relevance):
            cache = SemTokenCache(config=model.config)
            outputs = model(
                input_ids=prompt.ids[None],
                protected_mask=(prompt.opening | prompt.question)[None],
                query_mask=prompt.question[None] if self.marks_question and prompt.question_length else None,
                past_key_values=cache,
                logits_to_keep=1,
                compression=True,
            )
        span_ids = outputs.get("span_ids")
        kept = None
        if span_ids is not None:
            _, index, lengths = span_ids[0].unique(return_inverse=True, return_counts=True)
            kept = lengths[index] == 1
        held = cache.physical_length()
        compact = self.fields.get("position_mode", model.config.position_mode) == "compact"
        return Prefill(
            cache,
            outputs.logits[0, -1],
            held if compact else prompt.length,
            held,
            torch.ones(prompt.length, dtype=torch.bool) if kept is None else kept,
        )


@contextmanager
def changed_fields(model: Any, **fields: Any) -> Iterator[None]:
    """Within this block, the model compresses with these fields of the configuration.

    A merge mode without a residual also takes the learned merger away, as if the checkpoint had none.
    """
    config, base = model.config, model.base_model
    before = {name: getattr(config, name) for name in fields}
    merger, encoder = base.learned_merger, base.semantic_encoder
    try:
        for name, value in fields.items():
            setattr(config, name, value)
            if name in ENCODER_FIELDS:
                setattr(encoder, ENCODER_FIELDS[name], value)
        if fields.get("merge_mode", "learned") != "learned":
            base.learned_merger = None
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
            if name in ENCODER_FIELDS:
                setattr(encoder, ENCODER_FIELDS[name], value)
        base.learned_merger = merger


__all__ = ["Compressed", "changed_fields"]
