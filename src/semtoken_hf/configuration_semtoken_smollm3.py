"""Configuration of SemToken on SmolLM3."""

from transformers import SmolLM3Config

from .configuration_semtoken import SemTokenConfigMixin


class SemTokenSmolLM3Config(SemTokenConfigMixin, SmolLM3Config):
    """A `SmolLM3Config` with the compression fields of `SemTokenConfigMixin`."""

    model_type = "semtoken_smollm3"


__all__ = ["SemTokenSmolLM3Config"]
