"""Configuration of SemToken on Gemma3."""

from transformers import Gemma3TextConfig

from .configuration_semtoken import SemTokenConfigMixin


class SemTokenGemma3Config(SemTokenConfigMixin, Gemma3TextConfig):
    """A `Gemma3TextConfig` with the compression fields of `SemTokenConfigMixin`."""

    model_type = "semtoken_gemma3_text"


__all__ = ["SemTokenGemma3Config"]
