"""SemToken on Olmo2: the difference from `Olmo2Model` and `Olmo2ForCausalLM`, nothing else."""

from transformers import GenerationMixin, Olmo2ForCausalLM, Olmo2ForSequenceClassification, Olmo2Model

from .causal_lm_semtoken import SemTokenForCausalLMMixin
from .classification_semtoken import SemTokenForSequenceClassificationMixin
from .configuration_semtoken_olmo2 import SemTokenOlmo2Config
from .modeling_semtoken import SemTokenModelMixin


class SemTokenOlmo2Model(SemTokenModelMixin, Olmo2Model):
    """`Olmo2Model` with a compression stage before its first layer."""

    config_class = SemTokenOlmo2Config


class SemTokenOlmo2ForCausalLM(SemTokenForCausalLMMixin, Olmo2ForCausalLM, GenerationMixin):
    """`Olmo2ForCausalLM` that reads long prompts in fewer positions."""

    base_class = SemTokenOlmo2Model


class SemTokenOlmo2ForSequenceClassification(SemTokenForSequenceClassificationMixin, Olmo2ForSequenceClassification):
    """`Olmo2ForSequenceClassification` that reads long texts in fewer positions."""

    base_class = SemTokenOlmo2Model


__all__ = ["SemTokenOlmo2ForCausalLM", "SemTokenOlmo2ForSequenceClassification", "SemTokenOlmo2Model"]
