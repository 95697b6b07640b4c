"""SemToken (arXiv 2508.15190) as drop-in Transformers classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from .cache_semtoken import SemTokenCache
from .compression import CompressedPrompt
from .configuration_semtoken_llama import SemTokenLlamaConfig
from .modeling_semtoken_llama import SemTokenLlamaForCausalLM, SemTokenLlamaModel
from .standalone_planner import SpanPlanner
from .tokenization_semtoken_fast import SemTokenFastTokenizer

AutoConfig.register(SemTokenLlamaConfig.model_type, SemTokenLlamaConfig)
AutoModel.register(SemTokenLlamaConfig, SemTokenLlamaModel)
AutoModelForCausalLM.register(SemTokenLlamaConfig, SemTokenLlamaForCausalLM)
AutoTokenizer.register(SemTokenLlamaConfig, SemTokenFastTokenizer)

# What is saved carries its own code, so that it loads where this package is not installed.
SemTokenLlamaConfig.register_for_auto_class()
SemTokenLlamaModel.register_for_auto_class("AutoModel")
SemTokenLlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
SemTokenFastTokenizer.register_for_auto_class("AutoTokenizer")


def convert_checkpoint(*args, **kwargs):
    """See `semtoken_hf.conversion.checkpoint.convert_checkpoint`."""
    from .conversion.checkpoint import convert_checkpoint as convert

    return convert(*args, **kwargs)


__all__ = [
    "CompressedPrompt",
    "SemTokenCache",
    "SemTokenFastTokenizer",
    "SemTokenLlamaConfig",
    "SemTokenLlamaForCausalLM",
    "SemTokenLlamaModel",
    "SpanPlanner",
    "convert_checkpoint",
]
