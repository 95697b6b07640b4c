"""Configuration of SemToken on Mistral."""

from transformers import MistralConfig

from .configuration_semtoken import SemTokenConfigMixin


class SemTokenMistralConfig(SemTokenConfigMixin, MistralConfig):
    """A `MistralConfig` with the compression fields of `SemTokenConfigMixin`."""

    model_type = "semtoken_mistral"


__all__ = ["SemTokenMistralConfig"]
