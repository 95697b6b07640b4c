"""A PEFT adapter that acts on compressed rows alone: where nothing is merged, the model is bit for bit the plain one.

The base model says for each call which rows are compressed (`adapter_acts_on`); hooks on PEFT's own layers obey. The
answer is kept for each thread, so that threads sharing one model do not disturb each other, and in a form that
`torch.compile` traces.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from threading import local
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import cached_file, is_peft_available

from .logging_semtoken import get_logger

logger = get_logger(__name__)

ADAPTER_NAME = "semtoken"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# Of the names in PEFT's files.
PREFIX = "base_model.model."


class _Gate(local):
    """The rows of the current call: False for none, a tensor [B, 1 or T, 1] of zeros and ones, or None for all."""

    def __init__(self) -> None:
        self.rows: Tensor | bool | None = None


_GATE = _Gate()


@contextmanager
def adapter_acts_on(rows: Tensor | bool | None) -> Iterator[None]:
    """Within this block the adapter acts on `rows`: bool [B], or [B, T] by column, or True or False for all."""
    gate = rows.reshape(len(rows), -1, 1) if isinstance(rows, Tensor) else (None if rows is None or rows else False)
    before, _GATE.rows = _GATE.rows, gate
    try:
        yield
    finally:
        _GATE.rows = before


def remembering_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as the adapter acts now, whenever it is called: for layers recomputed in the backward pass."""
    rows = _GATE.rows

    def call(*args: Any, **kwargs: Any) -> Any:
        before, _GATE.rows = _GATE.rows, rows
        try:
            return function(*args, **kwargs)
        finally:
            _GATE.rows = before

    return call


def _skip_layer(layer: Any, inputs: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """PEFT's own way to run the base layer alone: name no adapter for any row."""
    acts_on = _GATE.rows
    if isinstance(acts_on, Tensor) and ADAPTER_NAME not in layer.active_adapters and not layer.disable_adapters:
        logger.warning_once(
            f"The checkpoint's adapter for compressed rows, '{ADAPTER_NAME}', is not active: expect worse text. "
            f"Activate both with `set_adapter(['{ADAPTER_NAME}', name])` of the model (or a PeftModel's `base_model`)."
        )
    if acts_on is not False or layer.active_adapters != [ADAPTER_NAME]:
        return None
    return inputs, {**kwargs, "adapter_names": ["__base__"] * len(inputs[0])}


def _mask_rows(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
    gate = _GATE.rows
    if gate is False:  # beside an adapter of the user's own
        return torch.zeros_like(output)
    return output * gate.to(output.device, output.dtype) if isinstance(gate, Tensor) else None


# PEFT is imported by name: a plain import would be a need of every checkpoint's remote code.
def adapted_layers(model: nn.Module) -> list[Any]:
    """PEFT's layers that hold the adapter `ADAPTER_NAME`."""
    lora_layer = import_module("peft.tuners.lora").LoraLayer
    return [layer for layer in model.modules() if isinstance(layer, lora_layer) and ADAPTER_NAME in layer.lora_B]


def gate_adapter(model: nn.Module) -> None:
    """Make the adapter `ADAPTER_NAME` of `model` obey `adapter_acts_on`."""
    for layer in adapted_layers(model):
        layer.register_forward_pre_hook(_skip_layer, with_kwargs=True)
        layer.lora_B[ADAPTER_NAME].register_forward_hook(_mask_rows)


def give_storage(model: nn.Module) -> None:
    """Storage for the adapter of layers whose own weights `accelerate` has offloaded: PEFT makes none for those."""
    for layer in adapted_layers(model):
        hook = getattr(layer.get_base_layer(), "_hf_hook", None)
        for part in (layer.lora_A[ADAPTER_NAME], layer.lora_B[ADAPTER_NAME]):
            if part.weight.is_meta:
                part.to_empty(device=getattr(hook, "execution_device", None) or "cpu")


def add_adapter(model: Any, lora_config: Any) -> None:
    """A new LoRA adapter on `model`, for compressed rows alone.

    Args:
        model: a SemToken model.
        lora_config: `peft.LoraConfig`; its default initialisation leaves the outputs unchanged.
    """
    model.add_adapter(lora_config, adapter_name=ADAPTER_NAME)
    model.config.adapter_subfolder = "adapter"
    gate_adapter(model)


def load_adapter(model: Any, checkpoint: str | Path, **hub: Any) -> None:
    """The adapter that `config.adapter_subfolder` names, from a checkpoint folder or Hub id; `hub`: of `cached_file`.

    Transformers' own `load_adapter` would rename the base weights, too, when they are saved again.

    Raises:
        ImportError: PEFT is not installed.
        OSError: the checkpoint lacks the adapter.
    """
    subfolder = model.config.adapter_subfolder
    if not is_peft_available():
        raise ImportError(
            f"the checkpoint reads merged slots through a PEFT adapter (`{subfolder}`): install `peft`, or load with "
            "`adapter_subfolder=None` to go without it, at a loss of quality"
        )
    peft, outer = import_module("peft"), hub.pop("subfolder", None)
    folder = f"{outer}/{subfolder}" if outer else subfolder
    config_file, weights = (str(cached_file(checkpoint, name, subfolder=folder, **hub)) for name in ADAPTER_FILES)
    trains = {id(p): p.requires_grad for p in model.parameters()}
    peft.inject_adapter_in_model(peft.PeftConfig.from_pretrained(str(Path(config_file).parent)), model, ADAPTER_NAME)
    for parameter in model.parameters():  # PEFT freezes the base
        parameter.requires_grad_(trains.get(id(parameter), True))
    base = f"{model.base_model_prefix}."
    own = "" if model.base_model is model else base
    state = {own + name.removeprefix(PREFIX).removeprefix(base): tensor for name, tensor in load_file(weights).items()}
    give_storage(model)
    outcome = peft.set_peft_model_state_dict(model, state, adapter_name=ADAPTER_NAME)
    if outcome.unexpected_keys or any(".lora_" in key for key in outcome.missing_keys):
        raise OSError(f"the adapter in {subfolder} does not fit the model: convert and adapt the checkpoint again")
    model._hf_peft_config_loaded = True
    gate_adapter(model)


def has_adapter(model: Any) -> bool:
    """Whether the adapter is in place."""
    return ADAPTER_NAME in (getattr(model, "peft_config", None) or {})


def saves_adapter(model: Any) -> bool:
    """Whether `save_pretrained` saves the checkpoint with its adapter.

    Not where another adapter is active, since Transformers then saves that alone, and not where the adapter is gone.
    """
    if has_adapter(model):
        return model.active_adapters() == [ADAPTER_NAME]
    if model.config.adapter_subfolder is not None and not getattr(model, "peft_config", None):
        logger.warning(
            f"The checkpoint's adapter for compressed rows, '{ADAPTER_NAME}', was merged or unloaded: saved without it."
        )
        model.config.adapter_subfolder = None
        # PEFT has taken every adapter out and does not say so.
        model._hf_peft_config_loaded = False
    return False


def without_adapter(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The base weights of a state dict under the names that the plain family uses."""
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_" not in name}


def save_adapter(model: Any, folder: Path) -> None:
    """Adapter weights and configuration in PEFT's format."""
    folder.mkdir(parents=True, exist_ok=True)
    state = import_module("peft").get_peft_model_state_dict(model, adapter_name=ADAPTER_NAME)
    tensors = {PREFIX + name: tensor.contiguous().cpu() for name, tensor in state.items()}
    save_file(tensors, folder / ADAPTER_FILES[1], metadata={"format": "pt"})
    config = copy.copy(model.peft_config[ADAPTER_NAME])
    # The base lies beside it, not where it was loaded from once.
    config.base_model_name_or_path = None
    config.save_pretrained(folder)


__all__ = [
    "adapter_acts_on",
    "add_adapter",
    "has_adapter",
    "load_adapter",
    "remembering_rows",
    "save_adapter",
    "saves_adapter",
    "without_adapter",
]
