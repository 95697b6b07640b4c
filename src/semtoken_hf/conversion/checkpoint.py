"""From a plain checkpoint and an encoder to one folder that loads as SemToken anywhere.

- The language model's tensors go from file to file, shard by shard and unchanged: no model is built in memory.
- Everything is written beside the target and renamed at the end: a conversion that is killed leaves no checkpoint.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import custom_object_save

from ..configuration_semtoken import ENCODER_DTYPES, RENAMED, SemTokenConfigMixin, SemTokenStaticEncoderConfig
from ..pretrained_semtoken import auto_map_of
from ..tokenization_semtoken_fast import SemTokenFastTokenizer, SpanPlannerConfig, special_token_ids
from .encoder import build_encoder, in_dtype
from .source import FAMILY_PREFIX, convertible_types, plain_source, read_model_type, resolve_folder
from .staging import check_output, remove_stale, staged_folder
from .text_markers import text_markers
from .vocabulary import digit_token_ids, rare_token_ids
from .weights import StoredTensor, find_tensors, rename_as_loaded, shortened, write_weights

ENCODER_KINDS = ("transformer", "static")
# In which the layers are stored that run in the dtype of their device: rounded once, so that devices differ the less.
STORED_AUTO = "bfloat16"


def convert_checkpoint(
    model: str | os.PathLike,
    encoder: str | os.PathLike | None,
    output_dir: str | os.PathLike,
    *,
    encoder_kind: str = "transformer",
    encoder_layers: int | None = None,
    encoder_dtype: str = "auto",
    static_dim: int = 64,
    protect_digits: bool = False,
    protect_rare: float = 0.0,
    revision: str | None = None,
    gguf_file: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    progress: bool = True,
    **config_overrides: Any,
) -> Path:
    """Write a SemToken checkpoint: weights, encoder, configuration, tokenizer and the code that loads them.

    Args:
        model: folder or Hub id of a plain checkpoint of a registered family, with a `tokenizer.json`; a GGUF file of
            such a model, or a folder with one; or a PEFT adapter of one, which is merged into it.
        encoder: folder or Hub id of a transformer encoder with its tokenizer; None only with
            `segmentation_mode="uniform"`, which reads no fingerprints.
        output_dir: the new folder.
        encoder_kind: "transformer" keeps the encoder's layers, its input embedding moved onto the model's
            vocabulary; "static" distils it to a table (see `distillation`).
        encoder_layers: the encoder's first layers that are read and kept; None: all.
        encoder_dtype: "auto", "bfloat16" or "float32", in which the layers run (see `SemTokenConfigMixin`). "auto"
            stores bfloat16. A table is float32.
        static_dim: length of the table's vectors.
        protect_digits: tokens with a digit always stay whole.
        protect_rare: share in [0, 1] of the vocabulary, the rarest, that always stays whole.
        revision: revision of `model` on the Hub.
        gguf_file: which file of `model`, where that is a folder with several GGUF files or a Hub repository.
        dtype: "float32" or "bfloat16", of the weights that a GGUF file is dequantised to (None: float32) or that an
            adapter is merged into (None: the base model's).
        trust_remote_code: for the encoder's tokenizer; its layers must be of a type that Transformers knows.
        allow_pickle: read the model's or the encoder's weights from `pytorch_model.bin`, in one file or several, where
            they are not there as safetensors. Tensors alone are read (`torch.load(weights_only=True)`), no code runs.
        max_shard_size: largest weight file, such as "5GB", and the memory that writing needs.
        overwrite: replace `output_dir`, at the very end, if it is a checkpoint.
        progress: show bars.
        config_overrides: fields of `SemTokenConfigMixin`; `protected_token_ids` come on top of the ids above.

    Returns:
        `output_dir`. Tensors of the model keep their bits and dtype; the encoder is in a file of its own.

    Raises:
        FileExistsError: `output_dir` exists.
        FileNotFoundError: no such model or encoder, or files of it are missing, or it has pickle weights alone.
        ImportError: the package that reads a GGUF file or an adapter is not installed.
        ValueError: an option or override makes no sense, or the model or encoder is of a kind that cannot be converted.
    """
    _check_options(encoder, encoder_kind, encoder_dtype, config_overrides)
    if encoder is None and encoder_layers is not None:
        raise ValueError("`encoder_layers` needs an `encoder` that has them")
    output = Path(output_dir).resolve()
    remove_stale(output)
    encoder_folder = None if encoder is None else resolve_folder(encoder, allow_pickle=allow_pickle)
    local = [Path(path) for path in (model, encoder_folder) if path is not None and Path(path).exists()]
    check_output(output, overwrite, local)
    with plain_source(model, output, revision, allow_pickle, gguf_file, dtype) as source:
        plain, tokenizer = read_plain_config(source), load_tokenizer(source)
        stored = rename_as_loaded(find_tensors(source, allow_pickle), causal_lm_class(plain))
        protected = _protected_ids(tokenizer, protect_digits, protect_rare)
        protected |= set(config_overrides.pop("protected_token_ids", None) or [])
        encoder_config, encoder_tensors = build_encoder(
            encoder_folder,
            encoder_kind,
            tokenizer,
            plain.vocab_size,
            static_dim,
            trust_remote_code,
            progress,
            encoder_layers,
            allow_pickle,
        )
        if isinstance(encoder_config, SemTokenStaticEncoderConfig):
            encoder_dtype = "float32"
        encoder_config.dtype = STORED_AUTO if encoder_dtype == "auto" else encoder_dtype
        prefix = f"{causal_lm_class(plain).base_model_prefix}.semantic_encoder.encoder."
        tensors = {prefix + name: in_dtype(tensor, encoder_config.dtype) for name, tensor in encoder_tensors.items()}
        config = build_config(
            plain,
            encoder_config=encoder_config,
            encoder_dtype=encoder_dtype,
            protected_token_ids=sorted(i for i in protected if i < plain.vocab_size),
            text_markers=text_markers(tokenizer, plain.vocab_size),
            dtype=plain.dtype or next(iter(stored.values())).dtype,
            **config_overrides,
        )
        with staged_folder(output, overwrite) as folder:
            check_tensors(save_code_and_config(config, folder), stored, tensors)
            tokenizer.save_pretrained(folder)
            if (source / "generation_config.json").is_file():
                shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")
            write_weights(folder, stored, tensors, max_shard_size, progress)
    return output


def _check_options(encoder: Any, encoder_kind: str, encoder_dtype: str, overrides: dict[str, Any]) -> None:
    if encoder_kind not in ENCODER_KINDS:
        raise ValueError(f"`encoder_kind` must be one of {list(ENCODER_KINDS)}, got {encoder_kind!r}")
    if encoder_dtype not in ENCODER_DTYPES:
        raise ValueError(f"`encoder_dtype` must be one of {list(ENCODER_DTYPES)}, got {encoder_dtype!r}")
    known = {field.name for field in fields(SemTokenConfigMixin)} - {"encoder_config", "text_markers"}
    if unknown := sorted(set(overrides) - known - set(RENAMED)):
        raise ValueError(f"unknown configuration fields {unknown}; known are {sorted(known)}")
    SpanPlannerConfig(**overrides)  # wrong values are refused before anything is read
    if encoder is None and overrides.get("segmentation_mode") != "uniform":
        raise ValueError(
            "an `encoder` is needed, such as 'sentence-transformers/all-MiniLM-L6-v2'; "
            "only segmentation_mode='uniform' does without"
        )


def _protected_ids(tokenizer: PreTrainedTokenizerBase, digits: bool, rare: float) -> set[int]:
    ids = {*special_token_ids(tokenizer), *rare_token_ids(tokenizer, rare)}
    return ids | set(digit_token_ids(tokenizer)) if digits else ids


def read_plain_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a plain, unquantised checkpoint of a family that SemToken knows."""
    model_type = read_model_type(folder)
    if model_type.startswith(FAMILY_PREFIX):
        raise ValueError(f"{folder} is a SemToken checkpoint already; convert the plain one that it was made from")
    if model_type not in convertible_types():
        raise ValueError(
            f"{folder} has model_type {model_type!r}; only {convertible_types()} can be converted. "
            "docs/compatibility.md of semtoken_hf shows how a family is added"
        )
    config = CONFIG_MAPPING[model_type].from_pretrained(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{folder} is quantised; convert the unquantised checkpoint and quantise the result")
    return config


def load_tokenizer(folder: Path) -> SemTokenFastTokenizer:
    """The checkpoint's tokenizer, exactly as its tokenizer.json says, whatever class it names."""
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no tokenizer.json; "
            "write it with `AutoTokenizer.from_pretrained(folder).save_pretrained(folder)`"
        )
    # On the left, as generation needs it.
    tokenizer = SemTokenFastTokenizer.from_pretrained(folder, padding_side="left")
    # It may name code that stays behind.
    tokenizer.init_kwargs.pop("auto_map", None)
    return tokenizer


def build_config(plain: PreTrainedConfig, **semtoken_fields: Any) -> PreTrainedConfig:
    """The plain configuration with the compression fields, of the family's SemToken class."""
    config_class = CONFIG_MAPPING[FAMILY_PREFIX + plain.model_type]
    dropped = {"model_type", "auto_map", "_name_or_path", "transformers_version"}
    kept = {name: value for name, value in plain.to_dict().items() if name not in dropped}
    config = config_class(**{**kept, **semtoken_fields})
    config.architectures = [causal_lm_class(config).__name__]
    return config


def causal_lm_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The language model that is registered for a configuration."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # type: ignore[return-value]


def save_code_and_config(config: PreTrainedConfig, folder: Path) -> PreTrainedModel:
    """Write config.json and the modules that its auto_map names; returns the model without storage."""
    with torch.device("meta"):
        model = causal_lm_class(config)(config)
    custom_object_save(model, folder, config=config)  # type: ignore[arg-type]
    config.auto_map = {**config.auto_map, **auto_map_of(type(model.base_model))}
    config.save_pretrained(folder)
    return model


def check_tensors(model: PreTrainedModel, stored: dict[str, StoredTensor], added: dict[str, Tensor]) -> None:
    """Raise ValueError unless the two together are the tensors that `model` loads."""
    shapes = {name: tensor.shape for name, tensor in (stored | added).items()}
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    if missing := sorted(expected.keys() - shapes.keys() - tied):
        raise ValueError(f"the checkpoint lacks tensors of a {type(model).__name__}: {shortened(missing)}")
    if wrong := sorted(name for name in expected.keys() & shapes.keys() if expected[name] != shapes[name]):
        raise ValueError(f"tensors have other shapes than config.json says: {shortened(wrong)}")


__all__ = ["convert_checkpoint"]
