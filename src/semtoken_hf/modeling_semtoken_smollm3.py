"""SemToken on SmolLM3: the difference from `SmolLM3Model` and `SmolLM3ForCausalLM`, nothing else."""

from transformers import GenerationMixin, SmolLM3ForCausalLM, SmolLM3Model

from .causal_lm_semtoken import SemTokenForCausalLMMixin
from .configuration_semtoken_smollm3 import SemTokenSmolLM3Config
from .modeling_semtoken import SemTokenModelMixin


class SemTokenSmolLM3Model(SemTokenModelMixin, SmolLM3Model):
    """`SmolLM3Model` with a compression stage before its first layer."""

    config_class = SemTokenSmolLM3Config


class SemTokenSmolLM3ForCausalLM(SemTokenForCausalLMMixin, SmolLM3ForCausalLM, GenerationMixin):
    """`SmolLM3ForCausalLM` that reads long prompts in fewer positions."""

    config_class = SemTokenSmolLM3Config
    base_class = SemTokenSmolLM3Model


__all__ = ["SemTokenSmolLM3ForCausalLM", "SemTokenSmolLM3Model"]
