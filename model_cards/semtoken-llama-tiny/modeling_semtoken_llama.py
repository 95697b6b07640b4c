"""SemToken on Llama: the difference from `LlamaModel` and `LlamaForCausalLM`, nothing else."""

from torch import nn
from transformers import GenerationMixin, LlamaForCausalLM, LlamaModel

from .causal_lm_semtoken import SemTokenForCausalLMMixin
from .configuration_semtoken_llama import SemTokenLlamaConfig
from .modeling_semtoken import SemTokenModelMixin


class SemTokenLlamaModel(SemTokenModelMixin, LlamaModel):
    """`LlamaModel` with a compression stage before its first layer."""

    config: SemTokenLlamaConfig
    config_class = SemTokenLlamaConfig
    _no_split_modules = ["LlamaDecoderLayer", "SemanticEncoder"]


class SemTokenLlamaForCausalLM(SemTokenForCausalLMMixin, LlamaForCausalLM, GenerationMixin):
    """`LlamaForCausalLM` that reads long prompts in fewer positions."""

    config: SemTokenLlamaConfig
    config_class = SemTokenLlamaConfig
    _no_split_modules = ["LlamaDecoderLayer", "SemanticEncoder"]

    def __init__(self, config: SemTokenLlamaConfig):
        # Past LlamaForCausalLM, which would build a plain LlamaModel first.
        super(LlamaForCausalLM, self).__init__(config)
        self.model = SemTokenLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


__all__ = ["SemTokenLlamaForCausalLM", "SemTokenLlamaModel"]
