"""SemToken on Qwen2: the difference from `Qwen2Model` and `Qwen2ForCausalLM`, nothing else."""

from transformers import GenerationMixin, Qwen2ForCausalLM, Qwen2Model

from .causal_lm_semtoken import SemTokenForCausalLMMixin
from .configuration_semtoken_qwen2 import SemTokenQwen2Config
from .modeling_semtoken import SemTokenModelMixin


class SemTokenQwen2Model(SemTokenModelMixin, Qwen2Model):
    """`Qwen2Model` with a compression stage before its first layer."""

    config_class = SemTokenQwen2Config


class SemTokenQwen2ForCausalLM(SemTokenForCausalLMMixin, Qwen2ForCausalLM, GenerationMixin):
    """`Qwen2ForCausalLM` that reads long prompts in fewer positions."""

    config_class = SemTokenQwen2Config
    base_class = SemTokenQwen2Model


__all__ = ["SemTokenQwen2ForCausalLM", "SemTokenQwen2Model"]
