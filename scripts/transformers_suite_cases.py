"""Transformers' own model tests, on plain Llama and on ours with compression off.

`transformers_suite.py` puts this file beside the tests of Transformers; it runs nowhere else.
"""

from __future__ import annotations

import unittest
import unittest.mock
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)
from transformers.models.auto import modeling_auto

from semtoken_hf.configuration_semtoken_llama import SemTokenLlamaConfig
from semtoken_hf.modeling_semtoken_llama import (
    SemTokenLlamaForCausalLM,
    SemTokenLlamaForQuestionAnswering,
    SemTokenLlamaForSequenceClassification,
    SemTokenLlamaForTokenClassification,
    SemTokenLlamaModel,
)

from ..generation.test_utils import GenerationTesterMixin
from ..test_configuration_common import ConfigTester
from ..test_modeling_common import ModelTesterMixin, ids_tensor
from ..test_training_mixin import TrainingTesterMixin

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 37,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = (
    SemTokenLlamaForCausalLM,
    SemTokenLlamaForSequenceClassification,
    SemTokenLlamaForTokenClassification,
    SemTokenLlamaForQuestionAnswering,
)
# The tests know by name what a class is for.
for kind, model_class in zip(
    ("", "_FOR_CAUSAL_LM", "_FOR_SEQUENCE_CLASSIFICATION", "_FOR_TOKEN_CLASSIFICATION", "_FOR_QUESTION_ANSWERING"),
    (SemTokenLlamaModel, *HEADS),
    strict=True,
):
    getattr(modeling_auto, f"MODEL{kind}_MAPPING_NAMES")["semtoken_llama"] = model_class.__name__


class Tester:
    """What the tests ask of a family: sizes, a configuration, inputs.

    Args:
        config: the class of the configuration.
        base: of the base model.
        heads: of the language model, the sequence classifier, and others.
        fields: of the configuration.
    """

    is_training = True
    batch_size, seq_length, num_labels = 13, 7, 3
    vocab_size, hidden_size = SIZES["vocab_size"], SIZES["hidden_size"]
    num_hidden_layers, num_attention_heads = SIZES["num_hidden_layers"], SIZES["num_attention_heads"]

    def __init__(self, config: Any, base: Any, heads: tuple[Any, ...], **fields: Any):
        self.config_class, self.base_model_class, self.fields = config, base, fields
        self.causal_lm_class, self.sequence_classification_class = heads[:2]
        self.all_model_classes = (base, *heads)

    def get_config(self) -> Any:
        return self.config_class(**SIZES, **self.fields)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.tril(torch.ones_like(ids))}


class Suite(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    """The tests of Transformers, and those that its test of Llama adds for configuration and heads."""

    model_tester: Tester

    def set_up(self, tester: Tester) -> None:
        self.model_tester, self.all_model_classes = tester, tester.all_model_classes
        self.config_tester = ConfigTester(self, config_class=tester.config_class)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def test_sequence_classification(self) -> None:
        tester = self.model_tester
        labels = ids_tensor([tester.batch_size], tester.num_labels)
        for problem in ("single_label_classification", "multi_label_classification"):
            config, inputs = tester.prepare_config_and_inputs_for_common()
            config.num_labels, config.problem_type = tester.num_labels, problem
            model = tester.sequence_classification_class(config).eval()
            several = torch.nn.functional.one_hot(labels, tester.num_labels).float()
            output = model(**inputs, labels=labels if problem.startswith("single") else several)
            assert output.logits.shape == (tester.batch_size, tester.num_labels)
            assert output.loss.isfinite()


class PlainLlamaTest(Suite, unittest.TestCase):
    def setUp(self) -> None:
        heads = LlamaForCausalLM, LlamaForSequenceClassification, LlamaForTokenClassification, LlamaForQuestionAnswering
        self.set_up(Tester(LlamaConfig, LlamaModel, heads))


class SemTokenLlamaTest(Suite, unittest.TestCase):
    def setUp(self) -> None:
        # "uniform", since a checkpoint without an encoder is refused on purpose where one is needed.
        off = {"compression": False, "segmentation_mode": "uniform"}
        self.set_up(Tester(SemTokenLlamaConfig, SemTokenLlamaModel, HEADS, **off))

    def test_left_padding_compatibility(self) -> None:
        if not hasattr(GenerationTesterMixin, "test_left_padding_compatibility"):
            self.skipTest("the source has no tests of generate")
        # It takes fields that begin with "encoder" for those of an encoder-decoder model, and would be skipped.
        whole = SemTokenLlamaConfig.to_dict

        def shown(config: Any) -> dict[str, Any]:
            return {name: value for name, value in whole(config).items() if not name.startswith("encoder")}

        with unittest.mock.patch.object(SemTokenLlamaConfig, "to_dict", shown):
            super().test_left_padding_compatibility()
