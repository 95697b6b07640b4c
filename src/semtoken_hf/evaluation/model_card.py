"""A checkpoint's card: how the model was made, and the figures of its evaluation."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from ..publishing.module_hashes import module_hashes, with_modules
from .files import write_text
from .report.detail_tables import without_folders
from .report.model_index import updated_card
from .report.report import draw_if_possible, linked_plots, markdown_section, save_plots


def describe_architecture(model: Any) -> str:
    config = model.config
    encoder = sum(p.numel() for p in model.base_model.semantic_encoder.parameters())
    return (
        f"{config.num_hidden_layers} layers, width {config.hidden_size}, {config.num_attention_heads} heads "
        f"({config.num_key_value_heads} of keys and values), vocabulary {config.vocab_size}, "
        f"{config.max_position_embeddings} positions. Encoder: {config.encoder_config.model_type} of width "
        f"{config.encoder_config.hidden_size}, {encoder / 1e6:.2f} M parameters, frozen. Defaults: "
        f'`segmentation_mode="{config.segmentation_mode}"`, `merge_mode="{config.merge_mode}"`, '
        f"`fingerprint_radius={config.fingerprint_radius}`, `keep_last={config.keep_last}`."
    )


def describe_training(log: Path) -> tuple[str, str]:
    """A sentence on the run and a table of its last held-out losses, from the trainer's `log.jsonl`."""
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    last = records[-1]
    evaluated = [r for r in records if "held_out" in r][-1]["held_out"]
    sentence = (
        f"`scripts/train_reference.py`, {last['step']:,} steps, {last['tokens'] / 1e6:.1f} M tokens, last training "
        f"loss {last['loss']:.2f} nats per token."
    )
    rows = [f"| `{name}` | {loss:.2f} | {math.exp(loss):.1f} |" for name, loss in evaluated.items()]
    return sentence, "\n".join(["| held out from | nats per token | perplexity |", "|---|---|---|", *rows])


def describe_adaptation(config: Any, command: str | None) -> str:
    """What the checkpoint was adapted for, and by which command."""
    adapted = config.adapted_for
    if not adapted:
        return "Not adapted: no distillation has taught the checkpoint to read merged slots."
    low, high = adapted["ratios"]
    parts = {
        "merger": "the learned merger",
        "lora": "the learned merger and a LoRA adapter",
        "full": "all but the encoder",
    }
    sentence = (
        f"`scripts/adapt.py`, {adapted['steps']:,} steps, training {parts[adapted['trainable']]}: the checkpoint was "
        f"taught to predict from a context at ratios {low:g} to {high:g} what it predicted from the whole context, "
        f'with `position_mode="{adapted["position_mode"]}"`. What that is worth, beside the baselines and other '
        "amounts of training: [adaptation.md](adaptation.md)."
    )
    return f"{sentence}\n\n```bash\n{command}\n```" if command else sentence


@dataclass(frozen=True)
class CardSources:
    """What a card is made from, beside the checkpoint.

    Attributes:
        template: Markdown with `$placeholders` and the markers of the evaluation.
        training_log: `log.jsonl` of the plain model's training.
        training_command, adaptation_command: what was run.
        metrics: `metrics.json` of the checkpoint's evaluation.
    """

    template: Path
    training_log: Path
    training_command: str
    metrics: Path
    adaptation_command: str | None = None


def write_card(model: Any, folder: Path, sources: CardSources) -> None:
    """Write `README.md` into `folder`, and beside it the `metrics.json` and the plots that it shows.

    Raises:
        ValueError: the template lacks the markers of the evaluation or, in part, of the modules.
    """
    metrics = json.loads(sources.metrics.read_text(encoding="utf-8"))
    metrics["config"] = without_folders(metrics["config"])
    for cell in metrics["cells"]:  # on the page only, and half of the file
        cell.pop("groups", None)
    plots = draw_if_possible(metrics)
    sentence, held_out = describe_training(sources.training_log)
    parameters = sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for p in model.base_model.semantic_encoder.parameters()
    )
    card = Template(sources.template.read_text(encoding="utf-8")).substitute(
        name=folder.name,
        path=f"model_cards/{folder.name}",
        parameters=f"{parameters / 1e6:.1f} M",
        target_ratio=model.config.target_ratio,
        architecture=describe_architecture(model),
        training=sentence,
        training_command=sources.training_command,
        adaptation=describe_adaptation(model.config, sources.adaptation_command),
        context=model.config.max_position_embeddings,
        held_out=held_out,
    )
    card = updated_card(card, metrics, markdown_section(metrics, plots), folder.name)
    card = with_modules(card, module_hashes(folder.glob("*.py")))
    short = json.dumps(rounded(metrics), separators=(",", ":"), ensure_ascii=False)
    write_text(folder / "metrics.json", short + "\n")
    save_plots(linked_plots(plots), folder / "plots", ("png",))
    write_text(folder / "README.md", card)


def rounded(metrics: Any) -> Any:
    """`metrics` with six digits of every figure: the card's copy is shipped with the checkpoint."""
    if isinstance(metrics, float):
        return float(f"{metrics:.6g}")
    if isinstance(metrics, dict):
        return {name: rounded(value) for name, value in metrics.items()}
    return [rounded(value) for value in metrics] if isinstance(metrics, list) else metrics
