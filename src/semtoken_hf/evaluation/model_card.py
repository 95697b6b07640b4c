"""A checkpoint's card, its figures measured here and written next to it as `metrics.json`."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch import Tensor

from .compressed_perplexity import (
    context_gain_kept,
    evaluate_reader,
    evaluate_references,
    make_windows,
    read_compressed,
)
from .files import write_text
from .provenance import markdown_provenance, provenance


def measure_costs(
    model: Any, windows: Tensor, context: int, ratios: list[float], modes: list[str]
) -> list[dict[str, Any]]:
    """Context-compressed perplexity of every mode and reference at every ratio.

    Returns:
        One record a row: ratio asked for, method, tokens per slot, perplexity, cost, context gain kept.
    """
    records: list[dict[str, Any]] = []
    references = evaluate_references(model, windows, context, ratios)
    own_mode = model.config.segmentation_mode
    for ratio in ratios:
        results = list(references[ratio])
        for mode in modes:
            model.config.segmentation_mode = mode
            name = f"SemToken, {mode}" if mode != "uniform" else "uniform spans (no encoder)"
            read = read_compressed(context, target_ratio=ratio)
            results.append(evaluate_reader(name, model, windows, read, context))
        model.config.segmentation_mode = own_mode
        full, none = results[0], results[1]
        records.extend(
            {
                "target_ratio": ratio,
                "method": r.name,
                "tokens_per_slot": r.ratio,
                "perplexity": r.perplexity,
                "cost": r.perplexity / full.perplexity - 1,
                "context_gain_kept": context_gain_kept(r, full, none),
            }
            for r in results
        )
    return records


def cost_table(records: list[dict[str, Any]]) -> str:
    lines = [
        "| ratio | context read as | tokens per slot | perplexity | cost | context gain kept |",
        "|---|---|---|---|---|---|",
    ]
    for r in records:
        lines.append(
            f"| {r['target_ratio']} | {r['method']} | {r['tokens_per_slot']:.2f} | {r['perplexity']:.2f} "
            f"| {100 * r['cost']:+.1f} % | {100 * r['context_gain_kept']:.0f} % |"
        )
    return "\n".join(lines)


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
        template: Markdown with `$placeholders`.
        training_log: `log.jsonl` of the plain model's training.
        training_command, adaptation_command: what was run.
        text_file: held-out text to measure on.
        context, target: tokens of a window.
        windows: at most so many.
        ratios: tokens per slot to measure at.
    """

    template: Path
    training_log: Path
    training_command: str
    text_file: Path
    context: int
    target: int
    windows: int
    ratios: list[float]
    adaptation_command: str | None = None


def write_card(model: Any, tokenizer: Any, folder: Path, sources: CardSources) -> dict[str, Any]:
    """Measure, then write `metrics.json` and `README.md` into `folder`; returns the metrics."""
    context, target = sources.context, sources.target
    text = sources.text_file.read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    windows = make_windows(ids, context, target, tokenizer.bos_token_id, sources.windows)
    # An adapted checkpoint reads the spans that it was adapted to.
    modes = [model.config.segmentation_mode] if model.config.adapted_for else ["boundary", "greedy", "uniform"]
    costs = measure_costs(model, windows, context, sources.ratios, modes)
    bytes_per_token = len(text.encode()) / len(ids)
    sentence, held_out = describe_training(sources.training_log)
    full = next(r for r in costs if r["method"] == "full context")
    metrics = {
        "text": sources.text_file.name,
        "windows": len(windows),
        "context": context,
        "target": target,
        "bits_per_byte_full_context": math.log2(full["perplexity"]) / bytes_per_token,
        "costs": costs,
        "provenance": provenance(),
    }
    write_text(folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    summary = (
        f"Context-compressed perplexity on `{sources.text_file.name}`: {len(windows)} "
        f"windows of {context} context and {target} target tokens; the targets are scored whole and the planner never "
        f"sees them. Full context: {metrics['bits_per_byte_full_context']:.3f} bits per byte. Cost is against the full "
        'context; "context gain kept" is the share of the full context\'s benefit over the protected tokens alone.'
    )
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
        evaluation=f"{summary}\n\n{cost_table(costs)}",
        provenance=markdown_provenance(),
    )
    write_text(folder / "README.md", card)
    return metrics
