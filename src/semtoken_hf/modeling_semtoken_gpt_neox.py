"""SemToken on GPTNeoX: the difference from `GPTNeoXModel` and `GPTNeoXForCausalLM`, nothing else."""

from transformers import (
    GenerationMixin,
    GPTNeoXForCausalLM,
    GPTNeoXForQuestionAnswering,
    GPTNeoXForSequenceClassification,
    GPTNeoXForTokenClassification,
    GPTNeoXModel,
)

from .causal_lm_semtoken import SemTokenForCausalLMMixin
from .classification_semtoken import (
    SemTokenForQuestionAnsweringMixin,
    SemTokenForSequenceClassificationMixin,
    SemTokenForTokenClassificationMixin,
)
from .configuration_semtoken_gpt_neox import SemTokenGPTNeoXConfig
from .modeling_semtoken import SemTokenModelMixin


class SemTokenGPTNeoXModel(SemTokenModelMixin, GPTNeoXModel):
    """`GPTNeoXModel` with a compression stage before its first layer."""

    config_class = SemTokenGPTNeoXConfig


class SemTokenGPTNeoXForCausalLM(SemTokenForCausalLMMixin, GPTNeoXForCausalLM, GenerationMixin):
    """`GPTNeoXForCausalLM` that reads long prompts in fewer positions."""

    base_class = SemTokenGPTNeoXModel


class SemTokenGPTNeoXForSequenceClassification(
    SemTokenForSequenceClassificationMixin, GPTNeoXForSequenceClassification
):
    """`GPTNeoXForSequenceClassification` that reads long texts in fewer positions."""

    base_class = SemTokenGPTNeoXModel


class SemTokenGPTNeoXForTokenClassification(SemTokenForTokenClassificationMixin, GPTNeoXForTokenClassification):
    """`GPTNeoXForTokenClassification`, which reads every token."""

    base_class = SemTokenGPTNeoXModel


class SemTokenGPTNeoXForQuestionAnswering(SemTokenForQuestionAnsweringMixin, GPTNeoXForQuestionAnswering):
    """`GPTNeoXForQuestionAnswering`, which reads every token."""

    base_class = SemTokenGPTNeoXModel


__all__ = [
    "SemTokenGPTNeoXForCausalLM",
    "SemTokenGPTNeoXForQuestionAnswering",
    "SemTokenGPTNeoXForSequenceClassification",
    "SemTokenGPTNeoXForTokenClassification",
    "SemTokenGPTNeoXModel",
]
