"""SemToken on Gemma3: the difference from `Gemma3TextModel` and `Gemma3ForCausalLM`, nothing else."""

from transformers import Gemma3ForCausalLM, Gemma3TextForSequenceClassification, Gemma3TextModel, GenerationMixin

from .causal_lm_semtoken import SemTokenForCausalLMMixin
from .classification_semtoken import SemTokenForSequenceClassificationMixin
from .configuration_semtoken_gemma3_text import SemTokenGemma3Config
from .modeling_semtoken import SemTokenModelMixin


class SemTokenGemma3Model(SemTokenModelMixin, Gemma3TextModel):
    """`Gemma3TextModel` with a compression stage before its first layer."""

    config_class = SemTokenGemma3Config


class SemTokenGemma3ForCausalLM(SemTokenForCausalLMMixin, Gemma3ForCausalLM, GenerationMixin):
    """`Gemma3ForCausalLM` that reads long prompts in fewer positions."""

    base_class = SemTokenGemma3Model


class SemTokenGemma3ForSequenceClassification(
    SemTokenForSequenceClassificationMixin, Gemma3TextForSequenceClassification
):
    """`Gemma3TextForSequenceClassification` that reads long texts in fewer positions."""

    base_class = SemTokenGemma3Model


__all__ = ["SemTokenGemma3ForCausalLM", "SemTokenGemma3ForSequenceClassification", "SemTokenGemma3Model"]
