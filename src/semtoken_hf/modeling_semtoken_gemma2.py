"""SemToken on Gemma2: the difference from `Gemma2Model` and `Gemma2ForCausalLM`, nothing else."""

from transformers import Gemma2ForCausalLM, Gemma2Model, GenerationMixin

from .causal_lm_semtoken import SemTokenForCausalLMMixin
from .configuration_semtoken_gemma2 import SemTokenGemma2Config
from .modeling_semtoken import SemTokenModelMixin


class SemTokenGemma2Model(SemTokenModelMixin, Gemma2Model):
    """`Gemma2Model` with a compression stage before its first layer."""

    config_class = SemTokenGemma2Config


class SemTokenGemma2ForCausalLM(SemTokenForCausalLMMixin, Gemma2ForCausalLM, GenerationMixin):
    """`Gemma2ForCausalLM` that reads long prompts in fewer positions."""

    config_class = SemTokenGemma2Config
    base_class = SemTokenGemma2Model


__all__ = ["SemTokenGemma2ForCausalLM", "SemTokenGemma2Model"]
