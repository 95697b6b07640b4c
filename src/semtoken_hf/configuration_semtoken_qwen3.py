"""Configuration of SemToken on Qwen3."""

from transformers import Qwen3Config

from .configuration_semtoken import SemTokenConfigMixin


class SemTokenQwen3Config(SemTokenConfigMixin, Qwen3Config):
    """A `Qwen3Config` with the compression fields of `SemTokenConfigMixin`."""

    model_type = "semtoken_qwen3"


__all__ = ["SemTokenQwen3Config"]
