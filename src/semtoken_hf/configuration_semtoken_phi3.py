"""Configuration of SemToken on Phi3."""

from transformers import Phi3Config

from .configuration_semtoken import SemTokenConfigMixin


class SemTokenPhi3Config(SemTokenConfigMixin, Phi3Config):
    """A `Phi3Config` with the compression fields of `SemTokenConfigMixin`."""

    model_type = "semtoken_phi3"


__all__ = ["SemTokenPhi3Config"]
