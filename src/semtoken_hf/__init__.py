"""SemToken (arXiv 2508.15190) as drop-in Transformers classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from .cache_semtoken import SemTokenCache
from .compression import CompressedPrompt
from .configuration_semtoken_gpt_neox import SemTokenGPTNeoXConfig
from .configuration_semtoken_llama import SemTokenLlamaConfig
from .configuration_semtoken_mistral import SemTokenMistralConfig
from .configuration_semtoken_qwen3 import SemTokenQwen3Config
from .modeling_semtoken_gpt_neox import SemTokenGPTNeoXForCausalLM, SemTokenGPTNeoXModel
from .modeling_semtoken_llama import SemTokenLlamaForCausalLM, SemTokenLlamaModel
from .modeling_semtoken_mistral import SemTokenMistralForCausalLM, SemTokenMistralModel
from .modeling_semtoken_qwen3 import SemTokenQwen3ForCausalLM, SemTokenQwen3Model
from .standalone_planner import SpanPlanner
from .tokenization_semtoken_fast import SemTokenFastTokenizer

FAMILIES = (
    (SemTokenLlamaConfig, SemTokenLlamaModel, SemTokenLlamaForCausalLM),
    (SemTokenMistralConfig, SemTokenMistralModel, SemTokenMistralForCausalLM),
    (SemTokenQwen3Config, SemTokenQwen3Model, SemTokenQwen3ForCausalLM),
    (SemTokenGPTNeoXConfig, SemTokenGPTNeoXModel, SemTokenGPTNeoXForCausalLM),
)
for _config, _model, _causal_lm in FAMILIES:
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    AutoModelForCausalLM.register(_config, _causal_lm)
    AutoTokenizer.register(_config, SemTokenFastTokenizer)
    # What is saved carries its own code, so that it loads where this package is not installed.
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModel")
    _causal_lm.register_for_auto_class("AutoModelForCausalLM")
SemTokenFastTokenizer.register_for_auto_class("AutoTokenizer")


def convert_checkpoint(*args, **kwargs):
    """See `semtoken_hf.conversion.checkpoint.convert_checkpoint`."""
    from .conversion.checkpoint import convert_checkpoint as convert

    return convert(*args, **kwargs)


__all__ = [
    "CompressedPrompt",
    "SemTokenCache",
    "SemTokenFastTokenizer",
    "SemTokenGPTNeoXConfig",
    "SemTokenGPTNeoXForCausalLM",
    "SemTokenGPTNeoXModel",
    "SemTokenLlamaConfig",
    "SemTokenLlamaForCausalLM",
    "SemTokenLlamaModel",
    "SemTokenMistralConfig",
    "SemTokenMistralForCausalLM",
    "SemTokenMistralModel",
    "SemTokenQwen3Config",
    "SemTokenQwen3ForCausalLM",
    "SemTokenQwen3Model",
    "SpanPlanner",
    "convert_checkpoint",
]
