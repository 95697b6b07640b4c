#!/usr/bin/env python
"""What choosing sentences by importance could bring on running text, at best: the model's own attention chooses.

    bash scripts/reference_model.sh minilm
    python scripts/measure_importance.py --checkpoint FOLDER --text-file wiki.test.txt --output importance.md

Three oracles choose the sentences that are kept, in as many slots as truncation keeps tokens; the rest is dropped. Two
of them read the scored text, which no planner may: an importance learned from the context alone stays below them.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import semtoken_hf  # noqa: F401 (registers the classes)
from semtoken_hf.evaluation.continuation import score_target
from semtoken_hf.evaluation.methods.selection import FullContext, Selection, Truncation
from semtoken_hf.evaluation.option_names import DashedParser
from semtoken_hf.evaluation.prompts import Prompt
from semtoken_hf.evaluation.provenance import publish_report
from semtoken_hf.evaluation.texts import add_text_arguments, load_windows, window_prompt
from semtoken_hf.sentence_selection import find_sentences
from semtoken_hf.token_layout import build_layout

CHOICES = {
    "latest": "the latest (truncation)",
    "tail": "attention of the last 64 context tokens, mean",
    "mean": "attention of the scored text, mean (oracle)",
    "max": "attention of the scored text, highest of each head (oracle)",
    "max, half latest": "the same for half of the slots, the latest for the other",
}


class AttentionToContext:
    """Collects, over all layers, what the attention of later tokens makes of each of the first `context` tokens."""

    def __init__(self, context: int):
        self.context = context
        self.scores: dict[str, Tensor] = {}

    def add(self, module: Any, inputs: Any, outputs: Any) -> None:
        """A forward hook of an attention layer whose second output is [1, heads, queries, keys]."""
        weights, count = outputs[1][0].float()[:, :, : self.context], self.context
        heads = {
            "tail": weights[:, count - 64 : count].mean(1),
            "mean": weights[:, count:].mean(1),
            "max": weights[:, count:].amax(1),
        }
        for name, values in heads.items():
            self.scores[name] = self.scores.get(name, 0) + values.mean(0)


def attention_scores(model: Any, window: Tensor, context: int) -> dict[str, Tensor]:
    """Scores float32 [context] of every context token of a window int64 [context + target]."""
    collector = AttentionToContext(context)
    hooks = [layer.self_attn.register_forward_hook(collector.add) for layer in model.base_model.layers]
    try:
        model(window[None], compression=False, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return collector.scores


@dataclass
class BySentence(Selection):
    """Whole sentences of the context by their mean score, the `latest` tokens in any case.

    Attributes:
        scores: float32 [context].
        latest: tokens.
    """

    scores: Tensor = field(default_factory=lambda: torch.zeros(0))
    latest: int = 0

    def choose(self, model: Any, prompt: Prompt, free: Tensor, count: int) -> Tensor:
        everything = torch.ones_like(prompt.ids, dtype=torch.bool)[None]
        layout = build_layout(everything, ~everything, ~everything, 0, 0, 0).trim(prompt.length, 1)
        ends = torch.tensor(model.config.text_markers["sentence_ends"])
        sentence = find_sentences(torch.isin(prompt.ids, ends), layout)
        totals = torch.zeros(int(sentence[-1]) + 1).index_add_(0, sentence, self.scores)
        order = (totals / sentence.bincount())[sentence]
        order[len(order) - self.latest :] = math.inf
        return free[order[free].argsort(descending=True, stable=True)[:count]]


def method_of(name: str, scores: dict[str, Tensor], slots: int) -> Selection:
    """How one of CHOICES reads a window with these attention scores."""
    if name == "latest":
        return Truncation(CHOICES[name])
    latest = slots // 2 if name.endswith("latest") else 0
    return BySentence(CHOICES[name], scores=scores[name.split(",")[0]], latest=latest)


@torch.no_grad()
def measure(model: Any, rows: Tensor, context: int, ratios: list[float]) -> dict[str, list[float]]:
    """Mean losses in nats of every window's target, by choice and ratio."""
    losses: dict[str, list[float]] = {}

    def read(name: str, method: Selection, prompt: Prompt, slots: int) -> None:
        nats = score_target(model, method.read(model, prompt, slots), prompt.target)
        losses.setdefault(name, []).append(float(nats.mean()))

    for number, window in enumerate(tqdm(rows, desc="window")):
        scores, prompt = attention_scores(model, window, context), window_prompt(number, window, context)
        read("full", FullContext("full"), prompt, context)
        for ratio in ratios:
            slots = prompt.budget(ratio)
            for name in CHOICES:
                read(f"{name} {ratio:g}", method_of(name, scores, slots), prompt, slots)
    return losses


def table(losses: dict[str, list[float]], ratios: list[float]) -> list[str]:
    """Cost and paired difference to truncation, by choice and ratio."""
    lines = ["| sentences kept by | " + " | ".join(f"{r:g}x: cost | nats more than truncation" for r in ratios) + " |"]
    lines.append("|---" * (1 + 2 * len(ratios)) + "|")
    full = torch.tensor(losses["full"])
    for name, title in CHOICES.items():
        cells = []
        for ratio in ratios:
            these = torch.tensor(losses[f"{name} {ratio:g}"])
            more = these - torch.tensor(losses[f"latest {ratio:g}"])
            error = more.std() / len(more) ** 0.5
            cells += [f"{100 * ((these.mean() - full.mean()).exp() - 1):+.1f} %", f"{more.mean():+.3f} ± {error:.3f}"]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = DashedParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    add_text_arguments(parser, context=1792, target=256)
    parser.add_argument("--ratios", type=float, nargs="+", default=[2.4, 4.0])
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    windows = load_windows(arguments, AutoTokenizer.from_pretrained(arguments.checkpoint))
    model = AutoModelForCausalLM.from_pretrained(
        arguments.checkpoint, dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    lines = ["# What an importance of sentences could bring on running text", ""]
    lines.append(
        f"{arguments.context} context and {arguments.target} scored tokens a window; what is not kept is dropped."
    )
    for text, rows in windows.items():
        lines += ["", f"## {text}, {len(rows)} windows", ""]
        lines += table(measure(model, rows, arguments.context, arguments.ratios), arguments.ratios)
    publish_report(lines, arguments.output)


if __name__ == "__main__":
    main()
