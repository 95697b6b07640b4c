#!/usr/bin/env python
"""Ablations of adaptation: many short runs from one start, over seeds, and one table. Runs that are done are kept.

    python scripts/ablate_adaptation.py --checkpoint semtoken --text corpus --text_file wiki.valid.txt \\
        --runs runs/ablations --suite segmentation --seeds 0 1 2 --output model_cards/NAME/ablation_segmentation.md

`--shard 0/2` and `--shard 1/2` train halves of the runs side by side; a call without `--shard` finishes and reports.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from semtoken_hf.evaluation.chance import chance_instead_of_entropy
from semtoken_hf.evaluation.compressed_perplexity import PerplexityResult, evaluate_references, evaluate_semtoken
from semtoken_hf.evaluation.provenance import publish_report
from semtoken_hf.evaluation.texts import add_text_arguments, load_windows
from semtoken_hf.training.adaptation import adapt
from semtoken_hf.training.adaptation_arguments import AdaptationArguments, AdaptationTrainingArguments
from semtoken_hf.training.adaptation_curve import read_curve


@dataclass
class Variant:
    """One line of an ablation.

    Attributes:
        fields: of the configuration.
        options: of `AdaptationArguments`.
        by_chance: random spans stay fine instead of those of highest entropy.
        with_transformer: starts from `--transformer_checkpoint`.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    by_chance: bool = False
    with_transformer: bool = False


PAPER = {"recency": 0}
SOLVED = {"recency": 0, "similarity_threshold": "null"}
SUITES = {
    "segmentation": {
        "greedy at the cap, entropy x recency (default)": Variant(),
        "the same, chance instead of entropy": Variant(by_chance=True),
        "recency alone (power 64)": Variant({"recency": 64}),
        "greedy at the cap, entropy": Variant(PAPER),
        "chance instead of entropy, no recency": Variant(PAPER, by_chance=True),
        "greedy, tau solved, no budget for entropy": Variant(SOLVED),
        "boundary": Variant({"segmentation_mode": "boundary"}),
        "uniform": Variant({"segmentation_mode": "uniform"}),
        "default, transformer encoder": Variant(with_transformer=True),
        "greedy at the cap, entropy, transformer encoder": Variant(PAPER, with_transformer=True),
    },
    "merging": {
        "representative + residual (default)": Variant(),
        "mean + residual": Variant({"merger_base": "mean"}),
        "span cap 8 (two slots per long span)": Variant({"max_span_length": 8}),
        "span cap 4 (four slots per long span)": Variant({"max_span_length": 4}),
        "narrower residual (rank 128)": Variant({"merger_rank": 128}),
        "cross entropy beside the KL": Variant(options={"cross_entropy_weight": 0.5}),
        "ratios 2 to 3 only": Variant(options={"ratios": [2.0, 3.0]}),
        "compact positions": Variant({"position_mode": "compact"}),
    },
    "tasks": {
        "single task": Variant(options={"count_flops": True}),
        "fixed multi-task": Variant(options={"tasks": "fixed", "count_flops": True}),
        "diminish": Variant(options={"tasks": "diminish", "count_flops": True}),
        "switch": Variant(options={"tasks": "switch", "count_flops": True}),
    },
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="where every run starts")
    parser.add_argument("--transformer_checkpoint", help="the same model converted with a transformer encoder")
    parser.add_argument("--text", required=True, help="folder to adapt on")
    parser.add_argument("--weights", nargs="*", default=[], help="FILE=WEIGHT as in adapt.py")
    add_text_arguments(parser, context=768, target=128)
    parser.add_argument("--runs", required=True, type=Path, help="where the runs go")
    parser.add_argument("--suite", required=True, choices=SUITES)
    parser.add_argument("--set_fields", nargs="*", default=[], help="FIELD=VALUE of every run, such as recency=0")
    parser.add_argument("--trainable", default="lora")
    parser.add_argument("--learning_rate", type=float, help="of every run; that of adapt.py if unset")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ratio", type=float, default=2.4)
    parser.add_argument("--shard", help="I/N: train every N-th run and report nothing")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def train(name: str, variant: Variant, seed: int, arguments: argparse.Namespace) -> Path:
    """The adapted folder of one run, trained unless it is there."""
    slug = "".join(c if c.isalnum() else "-" for c in name)
    folder = arguments.runs / arguments.suite / f"{slug}.{seed}"
    if (folder / "model").exists():
        return folder / "model"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokens").exists():  # one cache of token ids for all runs
        (arguments.runs / "tokens").mkdir(exist_ok=True)
        (folder / "tokens").symlink_to((arguments.runs / "tokens").resolve())
    checkpoint = arguments.transformer_checkpoint if variant.with_transformer else arguments.checkpoint
    options = {
        "objective": "window",
        "context_length": arguments.context,
        "min_context_length": arguments.context // 2,
        "target_length": arguments.target,
        "trainable": arguments.trainable,
        "weights": arguments.weights,
        "held_out_share": arguments.held_out_share,
        "set_fields": arguments.set_fields + [f"{k}={v}" for k, v in variant.fields.items()],
        **variant.options,
    }
    training = AdaptationTrainingArguments(
        output_dir=str(folder),
        max_steps=arguments.steps,
        seed=seed,
        eval_steps=max(1, arguments.steps // 8),
        learning_rate=arguments.learning_rate,
    )
    with chance_instead_of_entropy(seed, variant.by_chance):
        return adapt(AdaptationArguments(checkpoint=str(checkpoint), text=arguments.text, **options), training)


def evaluate(
    folder: Path, variant: Variant, windows: dict[str, torch.Tensor], arguments: argparse.Namespace
) -> dict[str, PerplexityResult]:
    """Results of one run, by text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    context, ratio = arguments.context, arguments.ratio
    with chance_instead_of_entropy(0, variant.by_chance):
        return {text: evaluate_semtoken(text, model, rows, context, ratio) for text, rows in windows.items()}


def flops_to_reach(curve: list[dict[str, float]], kl: float) -> float | None:
    """FLOPs at which a run's held-out KL first was at most `kl`, interpolated; None: never."""
    points = [(row["flops"], row["eval_kl"]) for row in curve]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y1 <= kl:
            return x1 if y0 <= kl or y0 == y1 else x0 + (x1 - x0) * (y0 - kl) / (y0 - y1)
    return None


def main() -> None:
    arguments = parse_arguments()
    runs = [(name, v, seed) for seed in arguments.seeds for name, v in SUITES[arguments.suite].items()]
    runs = [r for r in runs if arguments.transformer_checkpoint or not r[1].with_transformer]
    if arguments.shard:
        part, parts = (int(x) for x in arguments.shard.split("/"))
        runs = runs[part::parts]
    folders = {(name, seed): train(name, variant, seed, arguments) for name, variant, seed in runs}
    if not arguments.shard:
        report(runs, folders, arguments)


def reference_rows(windows: dict[str, torch.Tensor], arguments: Any) -> tuple[dict[str, float], list[str]]:
    """Perplexity of the full context by text, and table rows of the references."""
    plain = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32).eval()
    cells: dict[str, list[float]] = {}
    for rows in windows.values():
        for result in evaluate_references(plain, rows, arguments.context, [arguments.ratio])[arguments.ratio]:
            cells.setdefault(result.name, []).append(result.perplexity)
    full = next(iter(cells.values()))
    lines = []
    for name, values in cells.items():
        costs = (f"{100 * (value / f - 1):+.2f} %" for value, f in zip(values, full, strict=True))
        lines.append(f"| ({name}) | {' | '.join(costs)} |")
    return dict(zip(windows, full, strict=True)), lines


def report(runs: list[tuple[str, Variant, int]], folders: dict[Any, Path], arguments: argparse.Namespace) -> None:
    windows = load_windows(arguments, AutoTokenizer.from_pretrained(arguments.checkpoint))
    full, references = reference_rows(windows, arguments)
    costs: dict[str, dict[str, list[float]]] = {}
    for name, variant, seed in runs:
        for text, result in evaluate(folders[name, seed], variant, windows, arguments).items():
            of_variant = costs.setdefault(name, {}).setdefault(text, [])
            of_variant.append(100 * (result.perplexity / full[text] - 1))
    lines = [
        f"# Ablation: {arguments.suite}",
        "",
        f"Every run: {arguments.steps} steps of 4 windows, `--trainable {arguments.trainable}`"
        + (f", learning rate {arguments.learning_rate:g}" if arguments.learning_rate else "")
        + ", contexts of "
        f"{arguments.context // 2} to {arguments.context} tokens, from the same start; seeds {arguments.seeds} change "
        f"the order of the text and the ratios. Measured on {', '.join(f'{len(w)}' for w in windows.values())} windows "
        f"of {arguments.context} + {arguments.target} tokens at ratio {arguments.ratio}. Cost: perplexity against the "
        "full context before adaptation, mean and standard deviation over seeds."
        + (f" Every run with `{' '.join(arguments.set_fields)}`." if arguments.set_fields else ""),
        "",
        f"| variant | {' | '.join(windows)} |",
        "|---|" + "---|" * len(windows),
        *references,
    ]
    for name, by_text in costs.items():
        lines.append(f"| {name} | {' | '.join(map(mean_and_spread, by_text.values()))} |")
    if arguments.suite == "tasks":
        lines += ["", *flops_table(runs, folders)]
    publish_report(lines, arguments.output)


def mean_and_spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.2f}{spread} %"


def flops_table(runs: list[tuple[str, Variant, int]], folders: dict[Any, Path]) -> list[str]:
    """FLOPs spent, and FLOPs to the held-out KL that single-task training of the same seed ends with."""
    lines = ["| tasks | seed | FLOPs | final KL | FLOPs to the single task's final KL |", "|---|---|---|---|---|"]
    curves = {run: read_curve(folder.parent) for run, folder in folders.items()}
    for name, _, seed in runs:
        own, goal = curves[name, seed], curves["single task", seed][-1]["eval_kl"]
        reached = flops_to_reach(own, goal)
        needed = "never" if reached is None else f"{reached / 1e12:.2f} T"
        spent, final = own[-1]["flops"] / 1e12, own[-1]["eval_kl"]
        lines.append(f"| {name} | {seed} | {spent:.2f} T | {final:.4f} | {needed} |")
    return lines


if __name__ == "__main__":
    main()
