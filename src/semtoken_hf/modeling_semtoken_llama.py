"""SemToken on Llama: the difference from `LlamaModel` and `LlamaForCausalLM`, nothing else."""

from transformers import (
    GenerationMixin,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)

from .causal_lm_semtoken import SemTokenForCausalLMMixin
from .classification_semtoken import (
    SemTokenForQuestionAnsweringMixin,
    SemTokenForSequenceClassificationMixin,
    SemTokenForTokenClassificationMixin,
)
from .configuration_semtoken_llama import SemTokenLlamaConfig
from .modeling_semtoken import SemTokenModelMixin


class SemTokenLlamaModel(SemTokenModelMixin, LlamaModel):
    """`LlamaModel` with a compression stage before its first layer."""

    config_class = SemTokenLlamaConfig


class SemTokenLlamaForCausalLM(SemTokenForCausalLMMixin, LlamaForCausalLM, GenerationMixin):
    """`LlamaForCausalLM` that reads long prompts in fewer positions."""

    base_class = SemTokenLlamaModel


class SemTokenLlamaForSequenceClassification(SemTokenForSequenceClassificationMixin, LlamaForSequenceClassification):
    """`LlamaForSequenceClassification` that reads long texts in fewer positions."""

    base_class = SemTokenLlamaModel


class SemTokenLlamaForTokenClassification(SemTokenForTokenClassificationMixin, LlamaForTokenClassification):
    """`LlamaForTokenClassification`, which reads every token."""

    base_class = SemTokenLlamaModel


class SemTokenLlamaForQuestionAnswering(SemTokenForQuestionAnsweringMixin, LlamaForQuestionAnswering):
    """`LlamaForQuestionAnswering`, which reads every token."""

    base_class = SemTokenLlamaModel


__all__ = [
    "SemTokenLlamaForCausalLM",
    "SemTokenLlamaForQuestionAnswering",
    "SemTokenLlamaForSequenceClassification",
    "SemTokenLlamaForTokenClassification",
    "SemTokenLlamaModel",
]
