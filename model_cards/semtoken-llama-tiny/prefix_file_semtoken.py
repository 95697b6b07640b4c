"""A compressed prefix as a file: safetensors, and what the model must have in common with the one that made it."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .logging_semtoken import get_logger

logger = get_logger(__name__)
FORMAT, VERSION = "semtoken_prefix", "1"
# Of the configuration. Which tokens merge is settled in the file: the ratio, protection and the encoder may differ.
FIELDS = (
    *("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "rope_parameters", "sliding_window", "position_mode", "merge_mode", "merger_base"),
)
# What to do where one of these differs, before the file is given up.
REMEDIES = {
    "dtype": "load the model with that dtype",
    "position_mode": "set `config.position_mode` to the file's",
    "weights": "load the weights that made it (a fine-tuned, quantised or differently adapted model is another one)",
}
SAMPLES = 16


def identity_of(model: Any) -> dict[str, Any]:
    """What must be alike where slots and keys are used again; None for weights that lie where they cannot be read."""
    found = {name: getattr(model.config, name, None) for name in FIELDS}
    found |= {"dtype": str(model.dtype).removeprefix("torch."), "weights": digest_of_weights(model)}
    return json.loads(json.dumps(found))


def digest_of_weights(model: Any) -> str | None:
    """16 hexadecimal digits that training changes: of a few values of every tensor but the encoder's, which made the
    plan and nothing else. None where some are offloaded."""
    samples = []
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, Tensor) or "semantic_encoder." in name:
            continue
        for part in _plain_parts(value):
            if part.device.type == "meta":
                return None
            flat = part.detach().reshape(-1)
            samples.append(flat[:: max(flat.numel() // SAMPLES, 1)][:SAMPLES].float().cpu())
    return sha256(torch.cat(samples).numpy().tobytes()).hexdigest()[:16]


def _plain_parts(value: Tensor) -> list[Tensor]:
    """The tensors that a quantised or sharded one is made of."""
    if not is_traceable_wrapper_subclass(value):
        return [value]
    inner = [getattr(value, name) for name in value.__tensor_flatten__()[0]]
    return [part for tensor in inner for part in _plain_parts(tensor)]


def write_prefix(model: Any, path: Path, tensors: dict[str, Tensor]) -> None:
    """Write the tensors beside `path`, then rename: it is whole or not there."""
    metadata = {"format": FORMAT, "version": VERSION, "identity": json.dumps(identity_of(model))}
    staged = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, staged, metadata)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def read_prefix(model: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a file that `write_prefix` has written for a model like this one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no prefix, it is damaged, or it was made by another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} is no compressed prefix: write one with `prefix.save(path)`")
            if metadata["version"] != VERSION:
                raise ValueError(
                    f"{path} is of version {metadata['version']}, this code reads {VERSION}: compress the text again"
                )
            check_identity(path, json.loads(metadata["identity"]), identity_of(model))
            names = file.keys()
            # Copies: what maps the file breaks when somebody writes to it.
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no compressed prefix, or it is damaged ({error}): compress the text again"
        ) from error
    lengths = tensors["slot_lengths"]
    if int(lengths.sum()) != tensors["input_ids"].shape[1] or lengths.shape != tensors["inputs_embeds"].shape[:2]:
        raise ValueError(f"{path} is damaged: its slots do not add up to its tokens; compress the text again")
    return tensors


def check_identity(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise ValueError at the first thing in which the model of a file and this one differ."""
    for name, value in ours.items():
        other = theirs.get(name)
        if name == "weights" and None in (value, other):
            logger.warning_once(
                "Whether the weights are those that made a prefix was not checked: some are offloaded, or were when it "
                "was saved."
            )
        elif value != other:
            remedy = REMEDIES.get(name, "load the model that made it")
            raise ValueError(
                f"{path} does not fit this model: `{name}` is {other!r} in the file and {value!r} in the model; "
                f"{remedy}, or compress the text again with `compress_prefix`"
            )


__all__ = ["read_prefix", "write_prefix"]
