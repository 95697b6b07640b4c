"""SemToken on Phi3: the difference from `Phi3Model` and `Phi3ForCausalLM`, nothing else."""

from transformers import (
    GenerationMixin,
    Phi3ForCausalLM,
    Phi3ForSequenceClassification,
    Phi3ForTokenClassification,
    Phi3Model,
)

from .causal_lm_semtoken import SemTokenForCausalLMMixin
from .classification_semtoken import SemTokenForSequenceClassificationMixin, SemTokenForTokenClassificationMixin
from .configuration_semtoken_phi3 import SemTokenPhi3Config
from .modeling_semtoken import SemTokenModelMixin


class SemTokenPhi3Model(SemTokenModelMixin, Phi3Model):
    """`Phi3Model` with a compression stage before its first layer."""

    config_class = SemTokenPhi3Config


class SemTokenPhi3ForCausalLM(SemTokenForCausalLMMixin, Phi3ForCausalLM, GenerationMixin):
    """`Phi3ForCausalLM` that reads long prompts in fewer positions."""

    base_class = SemTokenPhi3Model


class SemTokenPhi3ForSequenceClassification(SemTokenForSequenceClassificationMixin, Phi3ForSequenceClassification):
    """`Phi3ForSequenceClassification` that reads long texts in fewer positions."""

    base_class = SemTokenPhi3Model


class SemTokenPhi3ForTokenClassification(SemTokenForTokenClassificationMixin, Phi3ForTokenClassification):
    """`Phi3ForTokenClassification`, which reads every token."""

    base_class = SemTokenPhi3Model


__all__ = [
    "SemTokenPhi3ForCausalLM",
    "SemTokenPhi3ForSequenceClassification",
    "SemTokenPhi3ForTokenClassification",
    "SemTokenPhi3Model",
]
