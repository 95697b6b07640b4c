"""SemToken on Gemma2: the difference from `Gemma2Model` and `Gemma2ForCausalLM`, nothing else."""

from transformers import (
    Gemma2ForCausalLM,
    Gemma2ForSequenceClassification,
    Gemma2ForTokenClassification,
    Gemma2Model,
    GenerationMixin,
)

from .causal_lm_semtoken import SemTokenForCausalLMMixin
from .classification_semtoken import SemTokenForSequenceClassificationMixin, SemTokenForTokenClassificationMixin
from .configuration_semtoken_gemma2 import SemTokenGemma2Config
from .modeling_semtoken import SemTokenModelMixin


class SemTokenGemma2Model(SemTokenModelMixin, Gemma2Model):
    """`Gemma2Model` with a compression stage before its first layer."""

    config_class = SemTokenGemma2Config


class SemTokenGemma2ForCausalLM(SemTokenForCausalLMMixin, Gemma2ForCausalLM, GenerationMixin):
    """`Gemma2ForCausalLM` that reads long prompts in fewer positions."""

    base_class = SemTokenGemma2Model


class SemTokenGemma2ForSequenceClassification(SemTokenForSequenceClassificationMixin, Gemma2ForSequenceClassification):
    """`Gemma2ForSequenceClassification` that reads long texts in fewer positions."""

    base_class = SemTokenGemma2Model


class SemTokenGemma2ForTokenClassification(SemTokenForTokenClassificationMixin, Gemma2ForTokenClassification):
    """`Gemma2ForTokenClassification`, which reads every token."""

    base_class = SemTokenGemma2Model


__all__ = [
    "SemTokenGemma2ForCausalLM",
    "SemTokenGemma2ForSequenceClassification",
    "SemTokenGemma2ForTokenClassification",
    "SemTokenGemma2Model",
]
