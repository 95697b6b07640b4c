"""SemToken on Qwen2: the difference from `Qwen2Model` and `Qwen2ForCausalLM`, nothing else."""

from transformers import (
    GenerationMixin,
    Qwen2ForCausalLM,
    Qwen2ForQuestionAnswering,
    Qwen2ForSequenceClassification,
    Qwen2ForTokenClassification,
    Qwen2Model,
)

from .causal_lm_semtoken import SemTokenForCausalLMMixin
from .classification_semtoken import (
    SemTokenForQuestionAnsweringMixin,
    SemTokenForSequenceClassificationMixin,
    SemTokenForTokenClassificationMixin,
)
from .configuration_semtoken_qwen2 import SemTokenQwen2Config
from .modeling_semtoken import SemTokenModelMixin


class SemTokenQwen2Model(SemTokenModelMixin, Qwen2Model):
    """`Qwen2Model` with a compression stage before its first layer."""

    config_class = SemTokenQwen2Config


class SemTokenQwen2ForCausalLM(SemTokenForCausalLMMixin, Qwen2ForCausalLM, GenerationMixin):
    """`Qwen2ForCausalLM` that reads long prompts in fewer positions."""

    base_class = SemTokenQwen2Model


class SemTokenQwen2ForSequenceClassification(SemTokenForSequenceClassificationMixin, Qwen2ForSequenceClassification):
    """`Qwen2ForSequenceClassification` that reads long texts in fewer positions."""

    base_class = SemTokenQwen2Model


class SemTokenQwen2ForTokenClassification(SemTokenForTokenClassificationMixin, Qwen2ForTokenClassification):
    """`Qwen2ForTokenClassification`, which reads every token."""

    base_class = SemTokenQwen2Model


class SemTokenQwen2ForQuestionAnswering(SemTokenForQuestionAnsweringMixin, Qwen2ForQuestionAnswering):
    """`Qwen2ForQuestionAnswering`, which reads every token."""

    base_class = SemTokenQwen2Model


__all__ = [
    "SemTokenQwen2ForCausalLM",
    "SemTokenQwen2ForQuestionAnswering",
    "SemTokenQwen2ForSequenceClassification",
    "SemTokenQwen2ForTokenClassification",
    "SemTokenQwen2Model",
]
