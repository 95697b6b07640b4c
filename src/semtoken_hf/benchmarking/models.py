"""Models of a shape with random weights, and the real text that they read."""

from __future__ import annotations

import copy
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ..configuration_semtoken import SemTokenConfigMixin
from ..configuration_semtoken_llama import SemTokenLlamaConfig
from ..conversion.planner import planner_on_vocabulary
from ..modeling_semtoken_llama import SemTokenLlamaForCausalLM
from ..semantic_encoder import SemanticEncoder
from ..tokenization_semtoken_fast import SpanPlanner
from .shapes import ModelShape, dtype_of

COMPRESSION = tuple(field.name for field in fields_of(SemTokenConfigMixin))
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def load_planner(
    checkpoint: str,
    encoder: str | dict[str, Any] | None = None,
    encoder_kind: str = "transformer",
    encoder_layers: int | None = None,
    **overrides: Any,
) -> SpanPlanner:
    """The compression fields of a checkpoint, and an encoder on its vocabulary.

    Args:
        checkpoint: SemToken folder or Hub id.
        encoder: folder or Hub id of a transformer encoder; a dict: `encoder_config` of one with random weights; None:
            the checkpoint's own.
        encoder_kind: what becomes of a real one: "transformer", or "static", a table distilled from it.
        encoder_layers: how many layers of a real one are kept; None: all.
        overrides: compression fields instead of the checkpoint's.

    Raises:
        ValueError: a field is unknown or out of its range.
    """
    planner = SpanPlanner.from_pretrained(checkpoint)
    known = {name: getattr(planner.config, name) for name in COMPRESSION}
    if unknown := sorted(overrides.keys() - known.keys()):
        raise ValueError(f"--overrides does not know {unknown}; it knows {sorted(known)}")
    # Random weights are adapted for nothing.
    known |= {"adapted_for": None, **overrides}
    if isinstance(encoder, str):
        # Those of the checkpoint's own encoder.
        known = {k: v for k, v in known.items() if k in overrides or k not in ("encoder_config", "encoder_dtype")}
        return planner_on_vocabulary(
            AutoTokenizer.from_pretrained(checkpoint), encoder, encoder_kind, encoder_layers=encoder_layers, **known
        )
    if encoder is not None:
        known["encoder_config"] = encoder
    special = {name: getattr(planner.config, name) for name in SPECIAL}
    config = type(planner.config)(vocab_size=planner.config.vocab_size, **special, **known)
    return SpanPlanner(config, planner.encoder if encoder is None else SemanticEncoder(config))


def build_model(
    shape: ModelShape,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    encoder: SpanPlanner | None = None,
    positions: int = 4096,
    attn_implementation: str = "sdpa",
    seed: int = 0,
    **fields: Any,
) -> SemTokenLlamaForCausalLM:
    """A SemToken Llama with random weights, made on the device in its dtype, in evaluation mode.

    Args:
        dtype: None: the shape's.
        encoder: compression fields and encoder, as `load_planner` finds them; None: the defaults and a random table.
        positions: longest sequence.
        fields: of the configuration, instead of all that.
    """
    compression: dict[str, Any] = {}
    if encoder is not None:
        compression = {name: getattr(encoder.config, name) for name in (*COMPRESSION, *SPECIAL)}
    sizes = shape.config_fields(0 if encoder is None else encoder.config.vocab_size, positions)
    config = SemTokenLlamaConfig(**{**sizes, **copy.deepcopy(compression), **fields})
    torch.manual_seed(seed)
    with torch.device(device):
        model = SemTokenLlamaForCausalLM._from_config(
            config, dtype=dtype or dtype_of(shape.dtype), attn_implementation=attn_implementation
        )
    if encoder is not None:
        # Ids that the text does not have.
        encoder.encoder.resize(config.vocab_size)
        model.model.semantic_encoder.load_state_dict(encoder.encoder.state_dict())
    model.model.semantic_encoder.freeze()
    return model.eval()


def plain_twin(model: Any) -> LlamaForCausalLM:
    """Plain Llama on the very weights of a SemToken model; its attention can be set apart."""
    known = LlamaConfig().to_dict().keys() - {"model_type", "architectures", "dtype"}
    config = LlamaConfig(**{name: value for name, value in model.config.to_dict().items() if name in known})
    with torch.device("meta"):
        plain = LlamaForCausalLM._from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    own = ("semantic_encoder.", "learned_merger.")
    weights = {name: value for name, value in model.state_dict().items() if not any(o in name for o in own)}
    plain.load_state_dict(weights, assign=True)
    # Buffers that no checkpoint holds.
    plain.model.rotary_emb = model.model.rotary_emb
    plain.generation_config = model.generation_config
    return plain.eval()


def text_ids(checkpoint: str, text_file: str) -> Tensor:
    """int64 [n]: a text in the tokens of a checkpoint, opened by its BOS, if it has one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no text.
    """
    path = Path(text_file)
    if not path.is_file():
        raise FileNotFoundError(f"there is no text at {text_file}; pass --text-file")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    if len(ids) < 2:
        raise ValueError(f"{text_file} holds no text")
    return torch.tensor([*([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]), *ids])


__all__ = ["build_model", "load_planner", "plain_twin", "text_ids"]
