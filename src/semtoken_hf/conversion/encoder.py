"""The encoder of a conversion: as many of its layers as are wanted, on the language model's vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from ..configuration_semtoken import SemTokenStaticEncoderConfig
from .distillation import distill_static_encoder
from .pickled_weights import PICKLE, PICKLE_FILES, REFUSED, holds_pickle, read_pickle
from .source import read_model_type
from .vocabulary import transplant_embeddings
from .weights import shortened


def build_encoder(
    folder: Path | None,
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    static_dim: int,
    trust_remote_code: bool,
    progress: bool,
    layers: int | None = None,
    allow_pickle: bool = False,
) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
    """Configuration and float32 tensors of the encoder on the model's vocabulary; a table of zeros without a folder."""
    static = SemTokenStaticEncoderConfig(vocab_size=vocab_size, hidden_size=static_dim, dtype="float32")
    if folder is None:
        return static, {"embeddings.weight": torch.zeros(vocab_size, static_dim)}
    encoder = load_encoder(folder, layers, allow_pickle)
    own_tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if kind == "static":
        table = distill_static_encoder(tokenizer, encoder, own_tokenizer, static_dim, vocab_size, progress)
        return static, {"embeddings.weight": table}
    embeddings = encoder.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    table = transplant_embeddings(tokenizer, own_tokenizer, embeddings.weight, vocab_size)
    encoder.set_input_embeddings(nn.Embedding.from_pretrained(table))
    config = encoder.config
    config.vocab_size, config._name_or_path = vocab_size, ""
    if hasattr(config, "auto_map"):  # names code that stays behind
        del config.auto_map
    return config, {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}


def load_encoder(folder: Path, layers: int | None = None, allow_pickle: bool = False) -> PreTrainedModel:
    """The first `layers` of a transformer encoder, None for all, in float32; see `find_tensors` for `allow_pickle`.

    A pooler that the checkpoint does not hold is zero, since nothing reads it.
    """
    model_type = read_model_type(folder)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"the encoder in {folder} has model_type {model_type!r}, which Transformers does not know")
    is_safe = any(folder.glob("*.safetensors"))
    if not is_safe and not (allow_pickle and holds_pickle(folder)):
        rest = f" and no {PICKLE}" if allow_pickle else f"; {REFUSED}"
        raise FileNotFoundError(f"the encoder in {folder} has no safetensors{rest}")
    if not is_safe:
        # Transformers reads them with `weights_only=True`, too; this says what is wrong with one.
        for file in folder.glob(PICKLE_FILES[0]):
            read_pickle(file)
    config = AutoConfig.from_pretrained(folder)
    if layers is not None:
        keep_layers(config, layers)
    with quiet_loading(layers is not None):
        encoder, info = AutoModel.from_pretrained(
            folder, config=config, dtype=torch.float32, use_safetensors=is_safe, output_loading_info=True
        )
    if encoder.config.is_encoder_decoder:
        raise ValueError(f"the encoder in {folder} is an encoder-decoder; use an encoder such as BERT or MiniLM")
    missing = set(info["missing_keys"])
    if lost := sorted(name for name in missing if "pooler." not in name):
        raise ValueError(f"the weights of the encoder in {folder} lack {shortened(lost)}")
    for name in missing:
        encoder.get_parameter(name).data.zero_()
    return encoder.eval()


@contextmanager
def quiet_loading(quiet: bool) -> Iterator[None]:
    """No table of the tensors that were left out on purpose; what is missing is checked here."""
    before = logging.get_verbosity()
    if quiet:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def keep_layers(config: PreTrainedConfig, layers: int) -> None:
    """Cut an encoder's configuration down to its first `layers`.

    Raises:
        ValueError: there are not so many, or the architecture does not count them as `num_hidden_layers`.
    """
    total = getattr(config, "num_hidden_layers", None)
    if total is None or config.model_type == "funnel":  # it sums its blocks and cannot be set
        raise ValueError(f"`encoder_layers` must be None: a {config.model_type} has no plain stack of layers")
    if isinstance(layers, bool) or not isinstance(layers, int) or not 1 <= layers <= total:
        raise ValueError(f"`encoder_layers` must be an integer in [1, {total}], the encoder's layers, got {layers!r}")
    # Under whatever name the architecture has for it: `attribute_map` translates.
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:layers]


def in_dtype(tensor: Tensor, dtype: str) -> Tensor:
    """Floating-point tensors in `dtype`, others as they are."""
    return tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor


__all__ = ["build_encoder", "in_dtype", "keep_layers", "load_encoder"]
