"""Configuration of SemToken on Llama."""

from transformers import LlamaConfig

from .configuration_semtoken import SemTokenConfigMixin


class SemTokenLlamaConfig(SemTokenConfigMixin, LlamaConfig):
    """A `LlamaConfig` with the compression fields of `SemTokenConfigMixin`."""

    model_type = "semtoken_llama"


__all__ = ["SemTokenLlamaConfig"]
