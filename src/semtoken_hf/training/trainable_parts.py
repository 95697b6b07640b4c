"""What an adaptation trains: the merger, the merger and a LoRA adapter, or everything but the encoder."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..adapter_semtoken import adapted_layers, add_adapter


def lora_targets(model: Any) -> str:
    """Every linear layer of the decoder layers, as PEFT's regular expression; nothing of the encoder or the merger."""
    name, layers = next((n, m) for n, m in model.base_model.named_children() if isinstance(m, nn.ModuleList))
    kinds = {n.split(".", 1)[1] for n, module in layers.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    return rf"({model.base_model_prefix}\.)?{name}\.\d+\.({'|'.join(map(re.escape, sorted(kinds)))})"


def check_installed(trainable: str) -> None:
    """Raise ImportError if what is to be trained needs PEFT and it is not installed."""
    if trainable == "lora" and find_spec("peft") is None:
        raise ImportError(
            "--trainable lora needs PEFT: install `peft` (pip install 'semtoken-hf[adapt]'), or train merger or full"
        )


def choose_trainable(model: Any, trainable: str, lora_rank: int, lora_alpha: int) -> None:
    """Set `requires_grad` on a model with a learned merger, adding the adapter where one is asked for.

    Trained parameters become float32, whatever the rest is.

    Raises:
        ImportError: "lora" without PEFT.
    """
    model.requires_grad_(trainable == "full")
    if trainable == "lora":
        check_installed(trainable)
        from peft import LoraConfig

        lora = LoraConfig(r=lora_rank, lora_alpha=lora_alpha, target_modules=lora_targets(model), task_type="CAUSAL_LM")
        add_adapter(model, lora)
    model.base_model.learned_merger.requires_grad_(True)
    model.base_model.semantic_encoder.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def leave_casts_to_autocast(model: Any) -> None:
    """Let the adapter read what its layer reads: PEFT would widen it to float32, for autocast to narrow it again."""
    for layer in adapted_layers(model):
        layer.cast_input_dtype_enabled = False


def parameter_groups(module: nn.Module, merger_learning_rate: float) -> list[dict[str, Any]]:
    """Optimiser groups: the merger and the auxiliary heads, which start from nothing, and what was trained before."""
    fresh: list[nn.Parameter] = []
    trained: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_fresh = "learned_merger" in name or name.startswith("head.")
            (fresh if is_fresh else trained).append(parameter)
    groups: list[dict[str, Any]] = [{"params": fresh, "lr": merger_learning_rate}]
    return groups + ([{"params": trained}] if trained else [])
