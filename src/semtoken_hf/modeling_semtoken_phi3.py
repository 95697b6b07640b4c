"""SemToken on Phi3: the difference from `Phi3Model` and `Phi3ForCausalLM`, nothing else."""

from transformers import GenerationMixin, Phi3ForCausalLM, Phi3Model

from .causal_lm_semtoken import SemTokenForCausalLMMixin
from .configuration_semtoken_phi3 import SemTokenPhi3Config
from .modeling_semtoken import SemTokenModelMixin


class SemTokenPhi3Model(SemTokenModelMixin, Phi3Model):
    """`Phi3Model` with a compression stage before its first layer."""

    config_class = SemTokenPhi3Config


class SemTokenPhi3ForCausalLM(SemTokenForCausalLMMixin, Phi3ForCausalLM, GenerationMixin):
    """`Phi3ForCausalLM` that reads long prompts in fewer positions."""

    config_class = SemTokenPhi3Config
    base_class = SemTokenPhi3Model


__all__ = ["SemTokenPhi3ForCausalLM", "SemTokenPhi3Model"]
