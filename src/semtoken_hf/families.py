"""The registry of model families: a row here and two small files make one (see docs/families.md)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from .tokenization_semtoken_fast import SemTokenFastTokenizer

# The family's model type in Transformers and the name of our classes, `SemToken{name}ForCausalLM` and so on.
FAMILIES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "smollm3": "SmolLM3",
    "phi3": "Phi3",
    "olmo2": "Olmo2",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
    "granite": "Granite",
    "gpt_neox": "GPTNeoX",
    "gpt2": "GPT2",
}


def classes_of(model_type: str, name: str, package: str = "semtoken_hf") -> tuple[Any, Any, Any]:
    """Configuration, base model and language model of a family, from its two files in `package`."""
    configuration = import_module(f".configuration_semtoken_{model_type}", package)
    modeling = import_module(f".modeling_semtoken_{model_type}", package)
    return (
        getattr(configuration, f"SemToken{name}Config"),
        getattr(modeling, f"SemToken{name}Model"),
        getattr(modeling, f"SemToken{name}ForCausalLM"),
    )


def register(config: Any, model: Any, causal_lm: Any) -> None:
    """Make a family known to the Auto classes, and let what is saved carry its own code, so that it loads where this
    package is not installed."""
    AutoConfig.register(config.model_type, config)
    AutoModel.register(config, model)
    AutoModelForCausalLM.register(config, causal_lm)
    AutoTokenizer.register(config, SemTokenFastTokenizer)
    config.register_for_auto_class()
    model.register_for_auto_class("AutoModel")
    causal_lm.register_for_auto_class("AutoModelForCausalLM")


def register_all() -> dict[str, Any]:
    """Register every family; returns its classes by name."""
    SemTokenFastTokenizer.register_for_auto_class("AutoTokenizer")
    found: dict[str, Any] = {}
    for model_type, name in FAMILIES.items():
        classes = classes_of(model_type, name)
        register(*classes)
        found |= {cls.__name__: cls for cls in classes}
    return found
