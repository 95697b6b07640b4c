"""SemToken on Mistral: the difference from `MistralModel` and `MistralForCausalLM`, nothing else."""

from transformers import GenerationMixin, MistralForCausalLM, MistralModel

from .causal_lm_semtoken import SemTokenForCausalLMMixin
from .configuration_semtoken_mistral import SemTokenMistralConfig
from .modeling_semtoken import SemTokenModelMixin


class SemTokenMistralModel(SemTokenModelMixin, MistralModel):
    """`MistralModel` with a compression stage before its first layer."""

    config_class = SemTokenMistralConfig


class SemTokenMistralForCausalLM(SemTokenForCausalLMMixin, MistralForCausalLM, GenerationMixin):
    """`MistralForCausalLM` that reads long prompts in fewer positions."""

    config_class = SemTokenMistralConfig
    base_class = SemTokenMistralModel


__all__ = ["SemTokenMistralForCausalLM", "SemTokenMistralModel"]
