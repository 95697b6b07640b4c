"""SemToken on Granite: the difference from `GraniteModel` and `GraniteForCausalLM`, nothing else."""

from transformers import GenerationMixin, GraniteForCausalLM, GraniteModel

from .causal_lm_semtoken import SemTokenForCausalLMMixin
from .configuration_semtoken_granite import SemTokenGraniteConfig
from .modeling_semtoken import SemTokenModelMixin


class SemTokenGraniteModel(SemTokenModelMixin, GraniteModel):
    """`GraniteModel` with a compression stage before its first layer."""

    config_class = SemTokenGraniteConfig


class SemTokenGraniteForCausalLM(SemTokenForCausalLMMixin, GraniteForCausalLM, GenerationMixin):
    """`GraniteForCausalLM` that reads long prompts in fewer positions."""

    base_class = SemTokenGraniteModel


__all__ = ["SemTokenGraniteForCausalLM", "SemTokenGraniteModel"]
