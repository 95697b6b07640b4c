"""Configuration of SemToken on GPT-2, which learns a vector for each position: slots are counted, "compact"."""

from transformers import GPT2Config

from .configuration_semtoken import SemTokenConfigMixin


class SemTokenGPT2Config(SemTokenConfigMixin, GPT2Config):
    """A `GPT2Config` with the compression fields of `SemTokenConfigMixin`."""

    model_type = "semtoken_gpt2"
    position_modes = ("compact",)


__all__ = ["SemTokenGPT2Config"]
