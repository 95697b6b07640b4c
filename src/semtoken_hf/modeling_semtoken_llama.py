"""SemToken on Llama: the difference from `LlamaModel` and `LlamaForCausalLM`, nothing else."""

from transformers import GenerationMixin, LlamaForCausalLM, LlamaModel

from .causal_lm_semtoken import SemTokenForCausalLMMixin
from .configuration_semtoken_llama import SemTokenLlamaConfig
from .modeling_semtoken import SemTokenModelMixin


class SemTokenLlamaModel(SemTokenModelMixin, LlamaModel):
    """`LlamaModel` with a compression stage before its first layer."""

    config_class = SemTokenLlamaConfig


class SemTokenLlamaForCausalLM(SemTokenForCausalLMMixin, LlamaForCausalLM, GenerationMixin):
    """`LlamaForCausalLM` that reads long prompts in fewer positions."""

    config_class = SemTokenLlamaConfig
    base_class = SemTokenLlamaModel


__all__ = ["SemTokenLlamaForCausalLM", "SemTokenLlamaModel"]
