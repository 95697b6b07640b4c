"""SemToken on Qwen3: the difference from `Qwen3Model` and `Qwen3ForCausalLM`, nothing else."""

from transformers import (
    GenerationMixin,
    Qwen3ForCausalLM,
    Qwen3ForQuestionAnswering,
    Qwen3ForSequenceClassification,
    Qwen3ForTokenClassification,
    Qwen3Model,
)

from .causal_lm_semtoken import SemTokenForCausalLMMixin
from .classification_semtoken import (
    SemTokenForQuestionAnsweringMixin,
    SemTokenForSequenceClassificationMixin,
    SemTokenForTokenClassificationMixin,
)
from .configuration_semtoken_qwen3 import SemTokenQwen3Config
from .modeling_semtoken import SemTokenModelMixin


class SemTokenQwen3Model(SemTokenModelMixin, Qwen3Model):
    """`Qwen3Model` with a compression stage before its first layer."""

    config_class = SemTokenQwen3Config


class SemTokenQwen3ForCausalLM(SemTokenForCausalLMMixin, Qwen3ForCausalLM, GenerationMixin):
    """`Qwen3ForCausalLM` that reads long prompts in fewer positions."""

    base_class = SemTokenQwen3Model


class SemTokenQwen3ForSequenceClassification(SemTokenForSequenceClassificationMixin, Qwen3ForSequenceClassification):
    """`Qwen3ForSequenceClassification` that reads long texts in fewer positions."""

    base_class = SemTokenQwen3Model


class SemTokenQwen3ForTokenClassification(SemTokenForTokenClassificationMixin, Qwen3ForTokenClassification):
    """`Qwen3ForTokenClassification`, which reads every token."""

    base_class = SemTokenQwen3Model


class SemTokenQwen3ForQuestionAnswering(SemTokenForQuestionAnsweringMixin, Qwen3ForQuestionAnswering):
    """`Qwen3ForQuestionAnswering`, which reads every token."""

    base_class = SemTokenQwen3Model


__all__ = [
    "SemTokenQwen3ForCausalLM",
    "SemTokenQwen3ForQuestionAnswering",
    "SemTokenQwen3ForSequenceClassification",
    "SemTokenQwen3ForTokenClassification",
    "SemTokenQwen3Model",
]
