"""Configuration of SemToken on Olmo2."""

from transformers import Olmo2Config

from .configuration_semtoken import SemTokenConfigMixin


class SemTokenOlmo2Config(SemTokenConfigMixin, Olmo2Config):
    """A `Olmo2Config` with the compression fields of `SemTokenConfigMixin`."""

    model_type = "semtoken_olmo2"


__all__ = ["SemTokenOlmo2Config"]
