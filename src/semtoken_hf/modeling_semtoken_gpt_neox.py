"""SemToken on GPTNeoX: the difference from `GPTNeoXModel` and `GPTNeoXForCausalLM`, nothing else."""

from transformers import GenerationMixin, GPTNeoXForCausalLM, GPTNeoXModel

from .causal_lm_semtoken import SemTokenForCausalLMMixin
from .configuration_semtoken_gpt_neox import SemTokenGPTNeoXConfig
from .modeling_semtoken import SemTokenModelMixin


class SemTokenGPTNeoXModel(SemTokenModelMixin, GPTNeoXModel):
    """`GPTNeoXModel` with a compression stage before its first layer."""

    config_class = SemTokenGPTNeoXConfig


class SemTokenGPTNeoXForCausalLM(SemTokenForCausalLMMixin, GPTNeoXForCausalLM, GenerationMixin):
    """`GPTNeoXForCausalLM` that reads long prompts in fewer positions."""

    config_class = SemTokenGPTNeoXConfig
    base_class = SemTokenGPTNeoXModel


__all__ = ["SemTokenGPTNeoXForCausalLM", "SemTokenGPTNeoXModel"]
