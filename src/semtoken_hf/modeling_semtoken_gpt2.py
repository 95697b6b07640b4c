"""SemToken on GPT2: the difference from `GPT2Model` and `GPT2LMHeadModel`, nothing else."""

from transformers import GenerationMixin, GPT2LMHeadModel, GPT2Model

from .causal_lm_semtoken import SemTokenForCausalLMMixin
from .configuration_semtoken_gpt2 import SemTokenGPT2Config
from .modeling_semtoken import SemTokenModelMixin


class SemTokenGPT2Model(SemTokenModelMixin, GPT2Model):
    """`GPT2Model` with a compression stage before its first layer."""

    config_class = SemTokenGPT2Config


class SemTokenGPT2ForCausalLM(SemTokenForCausalLMMixin, GPT2LMHeadModel, GenerationMixin):
    """`GPT2LMHeadModel` that reads long prompts in fewer positions."""

    config_class = SemTokenGPT2Config
    base_class = SemTokenGPT2Model


__all__ = ["SemTokenGPT2ForCausalLM", "SemTokenGPT2Model"]
