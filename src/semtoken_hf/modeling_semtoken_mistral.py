"""SemToken on Mistral: the difference from `MistralModel` and `MistralForCausalLM`, nothing else."""

from torch import nn
from transformers import GenerationMixin, MistralForCausalLM, MistralModel

from .causal_lm_semtoken import SemTokenForCausalLMMixin
from .configuration_semtoken_mistral import SemTokenMistralConfig
from .modeling_semtoken import SemTokenModelMixin


class SemTokenMistralModel(SemTokenModelMixin, MistralModel):
    """`MistralModel` with a compression stage before its first layer."""

    config: SemTokenMistralConfig
    config_class = SemTokenMistralConfig
    _no_split_modules = ["MistralDecoderLayer", "SemanticEncoder"]


class SemTokenMistralForCausalLM(SemTokenForCausalLMMixin, MistralForCausalLM, GenerationMixin):
    """`MistralForCausalLM` that reads long prompts in fewer positions."""

    config: SemTokenMistralConfig
    config_class = SemTokenMistralConfig
    _no_split_modules = ["MistralDecoderLayer", "SemanticEncoder"]

    def __init__(self, config: SemTokenMistralConfig):
        # Past MistralForCausalLM, which would build a plain MistralModel first.
        super(MistralForCausalLM, self).__init__(config)
        self.model = SemTokenMistralModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


__all__ = ["SemTokenMistralForCausalLM", "SemTokenMistralModel"]
