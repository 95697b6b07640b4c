#!/usr/bin/env python
"""Ablations of adaptation: many short runs from one start, over seeds, and one table. Runs that are done are kept.

    python scripts/ablate_adaptation.py --checkpoint semtoken --text corpus --text_file wiki.valid.txt \\
        --runs runs/ablations --suite segmentation --seeds 0 1 2 --output model_cards/NAME/ablation_segmentation.md

`--shard 0/2` and `--shard 1/2` train halves of the runs side by side; a call without `--shard` finishes and reports.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from semtoken_hf.evaluation.ablations import chance_instead_of_entropy
from semtoken_hf.evaluation.compressed_perplexity import (
    PerplexityResult,
    evaluate_reader,
    make_windows,
    read_compressed,
    reference_readers,
)
from semtoken_hf.evaluation.provenance import publish_report
from semtoken_hf.training.adaptation import adapt
from semtoken_hf.training.adaptation_arguments import AdaptationArguments, AdaptationTrainingArguments


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
        "span cap 4 (two slots per long span)": Variant({"max_span_length": 4}),
        "span cap 16": Variant({"max_span_length": 16}),
        "wider residual (rank 512)": Variant({"merger_rank": 512}),
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
    parser.add_argument("--held_out_share", type=float, default=0.01, help="as in adapt.py")
    parser.add_argument("--text_file", required=True, type=Path, help="text to measure on")
    parser.add_argument("--runs", required=True, type=Path, help="where the runs go")
    parser.add_argument("--suite", required=True, choices=SUITES)
    parser.add_argument("--set_fields", nargs="*", default=[], help="FIELD=VALUE of every run, such as recency=0")
    parser.add_argument("--trainable", default="lora")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--context", type=int, default=768)
    parser.add_argument("--target", type=int, default=128)
    parser.add_argument("--ratio", type=float, default=2.4)
    parser.add_argument("--windows", type=int, default=60)
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
        output_dir=str(folder), max_steps=arguments.steps, seed=seed, eval_steps=max(1, arguments.steps // 8)
    )
    with chance_instead_of_entropy(seed, variant.by_chance):
        return adapt(AdaptationArguments(checkpoint=str(checkpoint), text=arguments.text, **options), training)


def evaluate(name: str, folder: Path, variant: Variant, windows: torch.Tensor, arguments: Any) -> PerplexityResult:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    read = read_compressed(arguments.context, target_ratio=arguments.ratio)
    with chance_instead_of_entropy(0, variant.by_chance):
        return evaluate_reader(name, model, windows, read, arguments.context)


def flops_of(folder: Path) -> str:
    """FLOPs of a run, from the last line of its curve, as a cell of the table."""
    lines = (folder.parent / "curve.csv").read_text(encoding="utf-8").splitlines()
    values = dict(zip(lines[0].split(","), lines[-1].split(","), strict=True))
    return f"{float(values['flops']) / 1e12:.2f} T" if "flops" in values else ""


def flops_to_reach(folder: Path, kl: float) -> float | None:
    """FLOPs at which the run's held-out KL first was at most `kl`, interpolated; None: never."""
    header, *lines = (folder.parent / "curve.csv").read_text(encoding="utf-8").splitlines()
    rows = [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]
    points = [(float(r["flops"] or 0), float(r["eval_kl"])) for r in rows]
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


def report(runs: list[tuple[str, Variant, int]], folders: dict[Any, Path], arguments: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    text = arguments.text_file.read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    windows = make_windows(ids, arguments.context, arguments.target, tokenizer.bos_token_id, arguments.windows)
    plain = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32).eval()
    kept = math.ceil(arguments.context / arguments.ratio)
    references = [
        evaluate_reader(name, plain, windows, read, arguments.context)
        for name, read in reference_readers(plain.config, arguments.context, kept).items()
    ]
    full = references[0].perplexity
    costs: dict[str, list[float]] = {}
    for name, variant, seed in runs:
        result = evaluate(name, folders[name, seed], variant, windows, arguments)
        costs.setdefault(name, []).append(100 * (result.perplexity / full - 1))
    lines = [
        f"# Ablation: {arguments.suite}",
        "",
        f"Every run: {arguments.steps} steps of 4 windows, `--trainable {arguments.trainable}`, contexts of "
        f"{arguments.context // 2} to {arguments.context} tokens, from the same start; seeds {arguments.seeds} change "
        f"the order of the text and the ratios. Measured on `{arguments.text_file.name}`, {len(windows)} windows of "
        f"{arguments.context} + {arguments.target} tokens at ratio {arguments.ratio}. Cost: perplexity against the "
        "full context before adaptation; spread: standard deviation over seeds."
        + (f" Every run with `{' '.join(arguments.set_fields)}`." if arguments.set_fields else ""),
        "",
        "| variant | cost, mean over seeds | spread | each seed |",
        "|---|---|---|---|",
    ]
    lines += [f"| ({r.name}) | {100 * (r.perplexity / full - 1):+.2f} % | | |" for r in references]
    for name, values in costs.items():
        spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""
        each = ", ".join(f"{v:+.2f}" for v in values)
        lines.append(f"| {name} | {statistics.mean(values):+.2f} % | {spread} | {each} |")
    if arguments.suite == "tasks":
        lines += ["", *flops_table(runs, folders)]
    publish_report(lines, arguments.output)


def flops_table(runs: list[tuple[str, Variant, int]], folders: dict[Any, Path]) -> list[str]:
    """FLOPs spent, and FLOPs to the held-out KL that single-task training of the same seed ends with."""
    lines = ["| tasks | seed | FLOPs | final KL | FLOPs to the single task's final KL |", "|---|---|---|---|---|"]
    for name, _, seed in runs:
        curve = (folders["single task", seed].parent / "curve.csv").read_text(encoding="utf-8").splitlines()
        goal = float(dict(zip(curve[0].split(","), curve[-1].split(","), strict=True))["eval_kl"])
        own = (folders[name, seed].parent / "curve.csv").read_text(encoding="utf-8").splitlines()
        final = float(dict(zip(own[0].split(","), own[-1].split(","), strict=True))["eval_kl"])
        reached = flops_to_reach(folders[name, seed], goal)
        needed = "never" if reached is None else f"{reached / 1e12:.2f} T"
        lines.append(f"| {name} | {seed} | {flops_of(folders[name, seed])} | {final:.4f} | {needed} |")
    return lines


if __name__ == "__main__":
    main()
