"""SemToken on GPT2: the difference from `GPT2Model` and `GPT2LMHeadModel`, nothing else."""

from transformers import (
    GenerationMixin,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)

from .causal_lm_semtoken import SemTokenForCausalLMMixin
from .classification_semtoken import (
    SemTokenForQuestionAnsweringMixin,
    SemTokenForSequenceClassificationMixin,
    SemTokenForTokenClassificationMixin,
)
from .configuration_semtoken_gpt2 import SemTokenGPT2Config
from .modeling_semtoken import SemTokenModelMixin


class SemTokenGPT2Model(SemTokenModelMixin, GPT2Model):
    """`GPT2Model` with a compression stage before its first layer."""

    config_class = SemTokenGPT2Config


class SemTokenGPT2ForCausalLM(SemTokenForCausalLMMixin, GPT2LMHeadModel, GenerationMixin):
    """`GPT2LMHeadModel` that reads long prompts in fewer positions."""

    base_class = SemTokenGPT2Model


class SemTokenGPT2ForSequenceClassification(SemTokenForSequenceClassificationMixin, GPT2ForSequenceClassification):
    """`GPT2ForSequenceClassification` that reads long texts in fewer positions."""

    base_class = SemTokenGPT2Model


class SemTokenGPT2ForTokenClassification(SemTokenForTokenClassificationMixin, GPT2ForTokenClassification):
    """`GPT2ForTokenClassification`, which reads every token."""

    base_class = SemTokenGPT2Model


class SemTokenGPT2ForQuestionAnswering(SemTokenForQuestionAnsweringMixin, GPT2ForQuestionAnswering):
    """`GPT2ForQuestionAnswering`, which reads every token."""

    base_class = SemTokenGPT2Model


__all__ = [
    "SemTokenGPT2ForCausalLM",
    "SemTokenGPT2ForQuestionAnswering",
    "SemTokenGPT2ForSequenceClassification",
    "SemTokenGPT2ForTokenClassification",
    "SemTokenGPT2Model",
]
