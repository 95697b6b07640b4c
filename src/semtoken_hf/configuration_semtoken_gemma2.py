"""Configuration of SemToken on Gemma2."""

from transformers import Gemma2Config

from .configuration_semtoken import SemTokenConfigMixin


class SemTokenGemma2Config(SemTokenConfigMixin, Gemma2Config):
    """A `Gemma2Config` with the compression fields of `SemTokenConfigMixin`."""

    model_type = "semtoken_gemma2"


__all__ = ["SemTokenGemma2Config"]
