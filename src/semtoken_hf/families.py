"""The registry of model families: a row here and two small files make one (see docs/compatibility.md)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import transformers
from transformers import AutoConfig, AutoTokenizer

from .tokenization_semtoken_fast import SemTokenFastTokenizer

# The family's model type in Transformers and the name of our classes, `SemToken{name}Model` and so on.
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


def classes_of(model_type: str, name: str, package: str = "semtoken_hf") -> tuple[Any, ...]:
    """Configuration, base model and heads of a family, from its two files in `package`."""
    configuration = import_module(f".configuration_semtoken_{model_type}", package)
    modeling = import_module(f".modeling_semtoken_{model_type}", package)
    base = getattr(modeling, f"SemToken{name}Model")
    return getattr(configuration, f"SemToken{name}Config"), base, *base.heads


def register(config: Any, model: Any, *heads: Any) -> None:
    """Make a family known to the Auto classes, and let what is saved carry its own code, so that it loads where this
    package is not installed."""
    AutoConfig.register(config.model_type, config)
    AutoTokenizer.register(config, SemTokenFastTokenizer)
    config.register_for_auto_class()
    for auto_class, cls in (("AutoModel", model), *((head.auto_class, head) for head in heads)):
        getattr(transformers, auto_class).register(config, cls)
        cls.register_for_auto_class(auto_class)


def register_all() -> dict[str, Any]:
    """Register every family; returns its classes by name."""
    SemTokenFastTokenizer.register_for_auto_class("AutoTokenizer")
    found: dict[str, Any] = {}
    for model_type, name in FAMILIES.items():
        classes = classes_of(model_type, name)
        register(*classes)
        found |= {cls.__name__: cls for cls in classes}
    return found
