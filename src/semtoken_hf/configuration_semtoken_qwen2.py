"""Configuration of SemToken on Qwen2."""

from transformers import Qwen2Config

from .configuration_semtoken import SemTokenConfigMixin


class SemTokenQwen2Config(SemTokenConfigMixin, Qwen2Config):
    """A `Qwen2Config` with the compression fields of `SemTokenConfigMixin`."""

    model_type = "semtoken_qwen2"


__all__ = ["SemTokenQwen2Config"]
