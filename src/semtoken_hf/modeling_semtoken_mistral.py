"""SemToken on Mistral: the difference from `MistralModel` and `MistralForCausalLM`, nothing else."""

from transformers import (
    GenerationMixin,
    MistralForCausalLM,
    MistralForQuestionAnswering,
    MistralForSequenceClassification,
    MistralForTokenClassification,
    MistralModel,
)

from .causal_lm_semtoken import SemTokenForCausalLMMixin
from .classification_semtoken import (
    SemTokenForQuestionAnsweringMixin,
    SemTokenForSequenceClassificationMixin,
    SemTokenForTokenClassificationMixin,
)
from .configuration_semtoken_mistral import SemTokenMistralConfig
from .modeling_semtoken import SemTokenModelMixin


class SemTokenMistralModel(SemTokenModelMixin, MistralModel):
    """`MistralModel` with a compression stage before its first layer."""

    config_class = SemTokenMistralConfig


class SemTokenMistralForCausalLM(SemTokenForCausalLMMixin, MistralForCausalLM, GenerationMixin):
    """`MistralForCausalLM` that reads long prompts in fewer positions."""

    base_class = SemTokenMistralModel


class SemTokenMistralForSequenceClassification(
    SemTokenForSequenceClassificationMixin, MistralForSequenceClassification
):
    """`MistralForSequenceClassification` that reads long texts in fewer positions."""

    base_class = SemTokenMistralModel


class SemTokenMistralForTokenClassification(SemTokenForTokenClassificationMixin, MistralForTokenClassification):
    """`MistralForTokenClassification`, which reads every token."""

    base_class = SemTokenMistralModel


class SemTokenMistralForQuestionAnswering(SemTokenForQuestionAnsweringMixin, MistralForQuestionAnswering):
    """`MistralForQuestionAnswering`, which reads every token."""

    base_class = SemTokenMistralModel


__all__ = [
    "SemTokenMistralForCausalLM",
    "SemTokenMistralForQuestionAnswering",
    "SemTokenMistralForSequenceClassification",
    "SemTokenMistralForTokenClassification",
    "SemTokenMistralModel",
]
