"""SemToken on GPTNeoX: the difference from `GPTNeoXModel` and `GPTNeoXForCausalLM`, nothing else."""

from torch import nn
from transformers import GenerationMixin, GPTNeoXForCausalLM, GPTNeoXModel

from .causal_lm_semtoken import SemTokenForCausalLMMixin
from .configuration_semtoken_gpt_neox import SemTokenGPTNeoXConfig
from .modeling_semtoken import SemTokenModelMixin


class SemTokenGPTNeoXModel(SemTokenModelMixin, GPTNeoXModel):
    """`GPTNeoXModel` with a compression stage before its first layer."""

    config: SemTokenGPTNeoXConfig
    config_class = SemTokenGPTNeoXConfig
    _no_split_modules = ["GPTNeoXLayer", "SemanticEncoder"]


class SemTokenGPTNeoXForCausalLM(SemTokenForCausalLMMixin, GPTNeoXForCausalLM, GenerationMixin):
    """`GPTNeoXForCausalLM` that reads long prompts in fewer positions."""

    config: SemTokenGPTNeoXConfig
    config_class = SemTokenGPTNeoXConfig
    _no_split_modules = ["GPTNeoXLayer", "SemanticEncoder"]

    def __init__(self, config: SemTokenGPTNeoXConfig):
        # Past GPTNeoXForCausalLM, which would build a plain GPTNeoXModel first.
        super(GPTNeoXForCausalLM, self).__init__(config)
        self.gpt_neox = SemTokenGPTNeoXModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


__all__ = ["SemTokenGPTNeoXForCausalLM", "SemTokenGPTNeoXModel"]
