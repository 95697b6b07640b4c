"""SemToken on SmolLM3: the difference from `SmolLM3Model` and `SmolLM3ForCausalLM`, nothing else."""

from transformers import (
    GenerationMixin,
    SmolLM3ForCausalLM,
    SmolLM3ForQuestionAnswering,
    SmolLM3ForSequenceClassification,
    SmolLM3ForTokenClassification,
    SmolLM3Model,
)

from .causal_lm_semtoken import SemTokenForCausalLMMixin
from .classification_semtoken import (
    SemTokenForQuestionAnsweringMixin,
    SemTokenForSequenceClassificationMixin,
    SemTokenForTokenClassificationMixin,
)
from .configuration_semtoken_smollm3 import SemTokenSmolLM3Config
from .modeling_semtoken import SemTokenModelMixin


class SemTokenSmolLM3Model(SemTokenModelMixin, SmolLM3Model):
    """`SmolLM3Model` with a compression stage before its first layer."""

    config_class = SemTokenSmolLM3Config


class SemTokenSmolLM3ForCausalLM(SemTokenForCausalLMMixin, SmolLM3ForCausalLM, GenerationMixin):
    """`SmolLM3ForCausalLM` that reads long prompts in fewer positions."""

    base_class = SemTokenSmolLM3Model


class SemTokenSmolLM3ForSequenceClassification(
    SemTokenForSequenceClassificationMixin, SmolLM3ForSequenceClassification
):
    """`SmolLM3ForSequenceClassification` that reads long texts in fewer positions."""

    base_class = SemTokenSmolLM3Model


class SemTokenSmolLM3ForTokenClassification(SemTokenForTokenClassificationMixin, SmolLM3ForTokenClassification):
    """`SmolLM3ForTokenClassification`, which reads every token."""

    base_class = SemTokenSmolLM3Model


class SemTokenSmolLM3ForQuestionAnswering(SemTokenForQuestionAnsweringMixin, SmolLM3ForQuestionAnswering):
    """`SmolLM3ForQuestionAnswering`, which reads every token."""

    base_class = SemTokenSmolLM3Model


__all__ = [
    "SemTokenSmolLM3ForCausalLM",
    "SemTokenSmolLM3ForQuestionAnswering",
    "SemTokenSmolLM3ForSequenceClassification",
    "SemTokenSmolLM3ForTokenClassification",
    "SemTokenSmolLM3Model",
]
