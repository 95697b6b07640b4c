"""Configuration of SemToken on GPTNeoX."""

from transformers import GPTNeoXConfig

from .configuration_semtoken import SemTokenConfigMixin


class SemTokenGPTNeoXConfig(SemTokenConfigMixin, GPTNeoXConfig):
    """A `GPTNeoXConfig` with the compression fields of `SemTokenConfigMixin`."""

    model_type = "semtoken_gpt_neox"


__all__ = ["SemTokenGPTNeoXConfig"]
