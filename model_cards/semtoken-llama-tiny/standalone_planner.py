"""Planning without the language model: the encoder and the compression fields of a checkpoint, nothing else.

For data-loader workers: a few megabytes are read from the checkpoint, whatever its size.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from .configuration_semtoken import OLD_FIELDS, SemTokenConfigMixin
from .semantic_encoder import SemanticEncoder
from .span_planner import SpanPlan, always_protected, needs_encoder, plan_spans

ENCODER_PREFIX = "semantic_encoder."


class SpanPlannerConfig(SemTokenConfigMixin, PreTrainedConfig):
    """The compression fields of any SemToken configuration, whatever its family."""

    model_type = "semtoken_planner"

    vocab_size: int = 32000
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None


class SpanPlanner:
    """Plans as the model of the same checkpoint does.

    Args:
        config: a SemToken configuration.
        encoder: its frozen encoder; None where planning needs none.
    """

    def __init__(self, config: Any, encoder: SemanticEncoder | None):
        self.config = config
        self.encoder: Any = encoder

    @classmethod
    def from_model(cls, model: Any) -> SpanPlanner:
        """The planner of a loaded model, sharing its encoder."""
        return cls(model.config, model.base_model.semantic_encoder)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike, config_fields: dict[str, Any] | None = None, **hub: Any
    ) -> SpanPlanner:
        """Load configuration and encoder from a checkpoint folder or Hub id.

        Args:
            name_or_path: as in `AutoModel.from_pretrained`.
            config_fields: compression fields instead of the checkpoint's.
            hub: `revision`, `token`, `cache_dir`, `local_files_only`, ... of `cached_file`.

        Raises:
            OSError: no such checkpoint, or its weights are damaged.
            ValueError: it holds no encoder, or one that does not fit its configuration; or a field is unknown or makes
                no sense.
        """
        known = {*SpanPlannerConfig.__dataclass_fields__, *OLD_FIELDS}
        if unknown := sorted(set(config_fields or ()) - known):
            raise ValueError(f"the configuration has no fields {unknown}")
        try:
            fields = PreTrainedConfig.get_config_dict(name_or_path, **hub)[0]
            fields = {key: value for key, value in fields.items() if key in known}
            config = SpanPlannerConfig(**fields)
        except OSError:
            raise
        except Exception as error:  # of whatever kind Transformers likes
            raise ValueError(f"config.json of {name_or_path} does not say how to plan: {error}") from error
        if config_fields:
            config = SpanPlannerConfig(**{**fields, **config_fields})
        weights = read_encoder_weights(name_or_path, needs_encoder(config), **hub)
        if not weights:
            return cls(config, None)
        with torch.device("meta"):  # so that nothing is as large as a damaged configuration says
            expected = {name: tensor.shape for name, tensor in SemanticEncoder(config).state_dict().items()}
        found = {name: tensor.shape for name, tensor in weights.items()}
        if wrong := sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name)):
            raise ValueError(
                f"the semantic encoder of {name_or_path} does not fit its config.json: {wrong[0]} and {len(wrong) - 1} "
                "more tensors are missing, unknown or of another shape"
            )
        encoder = SemanticEncoder(config)
        encoder.load_state_dict(weights)
        return cls(config, encoder)

    @property
    def protected_token_ids(self) -> list[int]:
        """Ids that never merge."""
        return always_protected(self.config)

    def resize(self, vocab_size: int) -> None:
        """Follow added tokens as `model.resize_token_embeddings` does: they get the encoder's mean state.

        A planner from `from_model` shares the model's encoder: resize the model.
        """
        self.config.vocab_size = vocab_size
        if self.encoder is not None:
            self.encoder.resize(vocab_size)

    def plan(self, input_ids: Tensor, attention_mask: Tensor | None = None, **planning: Any) -> SpanPlan:
        """As `plan_spans`: input_ids int64 [B, T], attention_mask [B, T]."""
        return plan_spans(self.config, self.encoder, input_ids, attention_mask, **planning)


def read_encoder_weights(name_or_path: str | os.PathLike, required: bool = True, **hub: Any) -> dict[str, Tensor]:
    """The encoder's tensors, float32, under the names of `SemanticEncoder`.

    Raises:
        OSError: a file is damaged.
        ValueError: the checkpoint holds none, and they are `required`.
    """
    index = cached_file(name_or_path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    files = {SAFE_WEIGHTS_NAME}
    if index is not None:
        try:
            weight_map = json.loads(Path(index).read_bytes())["weight_map"]
            files = {str(file) for key, file in weight_map.items() if ENCODER_PREFIX in key}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OSError(f"{index} is damaged: {error!r}") from error
    weights: dict[str, Tensor] = {}
    for file in sorted(files):
        try:
            with safe_open(cached_file(name_or_path, file, **hub), "pt") as shard:
                for key in shard.keys():  # noqa: SIM118 (no mapping)
                    if ENCODER_PREFIX in key:
                        weights[key.split(ENCODER_PREFIX, 1)[1]] = shard.get_tensor(key).to(torch.float32)
        except SafetensorError as error:
            raise OSError(f"{file} of {name_or_path} is damaged: {error}") from error
    if required and not weights:
        raise ValueError(f"{name_or_path} holds no semantic encoder: convert it with `semtoken_hf.convert_checkpoint`")
    return weights


__all__ = ["SpanPlanner", "SpanPlannerConfig"]
