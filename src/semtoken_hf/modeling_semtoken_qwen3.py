"""SemToken on Qwen3: the difference from `Qwen3Model` and `Qwen3ForCausalLM`, nothing else."""

from torch import nn
from transformers import GenerationMixin, Qwen3ForCausalLM, Qwen3Model

from .causal_lm_semtoken import SemTokenForCausalLMMixin
from .configuration_semtoken_qwen3 import SemTokenQwen3Config
from .modeling_semtoken import SemTokenModelMixin


class SemTokenQwen3Model(SemTokenModelMixin, Qwen3Model):
    """`Qwen3Model` with a compression stage before its first layer."""

    config: SemTokenQwen3Config
    config_class = SemTokenQwen3Config
    _no_split_modules = ["Qwen3DecoderLayer", "SemanticEncoder"]


class SemTokenQwen3ForCausalLM(SemTokenForCausalLMMixin, Qwen3ForCausalLM, GenerationMixin):
    """`Qwen3ForCausalLM` that reads long prompts in fewer positions."""

    config: SemTokenQwen3Config
    config_class = SemTokenQwen3Config
    _no_split_modules = ["Qwen3DecoderLayer", "SemanticEncoder"]

    def __init__(self, config: SemTokenQwen3Config):
        # Past Qwen3ForCausalLM, which would build a plain Qwen3Model first.
        super(Qwen3ForCausalLM, self).__init__(config)
        self.model = SemTokenQwen3Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


__all__ = ["SemTokenQwen3ForCausalLM", "SemTokenQwen3Model"]
