"""Configuration of SemToken on Granite."""

from transformers import GraniteConfig

from .configuration_semtoken import SemTokenConfigMixin


class SemTokenGraniteConfig(SemTokenConfigMixin, GraniteConfig):
    """A `GraniteConfig` with the compression fields of `SemTokenConfigMixin`."""

    model_type = "semtoken_granite"


__all__ = ["SemTokenGraniteConfig"]
