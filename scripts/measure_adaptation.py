#!/usr/bin/env python
"""What adaptation is worth: context-compressed perplexity of one checkpoint and its adapted versions, with baselines.

    python scripts/measure_adaptation.py --checkpoint semtoken --text-file wiki.test.txt \\
        --held-out corpus/english_novels_100.txt.xz --ratios 2.4 4 \\
        --adapted "merger only=runs/merger/model" "full=runs/full/model" --output model_cards/NAME/adaptation.md

Every text is read by the same windows in every way. Baselines are read by the checkpoint itself, uncompressed.

    python scripts/measure_adaptation.py --checkpoint semtoken --objectives 4

measures instead what a step of either objective costs, over 4 of each: targets a second and a TFLOP.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

import semtoken_hf  # noqa: F401 (registers the classes)
from semtoken_hf.evaluation.compressed_perplexity import (
    PerplexityResult,
    evaluate_method,
    evaluate_references,
    evaluate_semtoken,
    perplexity_table,
)
from semtoken_hf.evaluation.methods import METHODS
from semtoken_hf.evaluation.named_values import read_fields, read_pairs
from semtoken_hf.evaluation.option_names import DashedParser
from semtoken_hf.evaluation.provenance import publish_report
from semtoken_hf.evaluation.texts import add_text_arguments, load_windows
from semtoken_hf.training.adaptation import build_objective, load_student
from semtoken_hf.training.adaptation_arguments import OBJECTIVES, AdaptationArguments, AdaptationTrainingArguments
from semtoken_hf.training.adaptation_trainer import CPU_ATTENTION
from semtoken_hf.training.trainable_parts import choose_trainable, leave_casts_to_autocast


def parse_arguments() -> argparse.Namespace:
    parser = DashedParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="the checkpoint before its adaptation")
    parser.add_argument("--adapted", nargs="+", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--objectives", type=int, default=0, metavar="STEPS", help="measure the cost of so many steps")
    add_text_arguments(parser, context=1792, target=256)
    parser.add_argument("--ratios", type=float, nargs="+", default=[2.4, 4.0])
    parser.add_argument("--set-fields", nargs="*", default=[], help="FIELD=VALUE for every checkpoint: query_weight=0")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    return parser.parse_args()


def load(folder: str, pairs: list[str]) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **read_fields(pairs, "set_fields")).eval()


def measure(arguments: argparse.Namespace, windows: dict[str, torch.Tensor]) -> dict[tuple[str, float], list[Any]]:
    """Results of every way to read, by text and ratio; the first two are the full context and none."""
    context, results = arguments.context, {}
    plain = load(arguments.checkpoint, arguments.set_fields)
    for text, rows in windows.items():
        for ratio, references in evaluate_references(plain, rows, context, arguments.ratios).items():
            results[text, ratio] = references
            for name, method in (("SemToken", "semtoken"), ("uniform spans", "uniform")):
                way = (f"{name}, untrained", plain, rows, METHODS[method], context, ratio)
                results[text, ratio].append(evaluate_method(*way))
    for name, folder in read_pairs(arguments.adapted, "adapted").items():
        model = load(folder, arguments.set_fields)
        changed = (model.config.adapted_for or {}).get("trainable") == "full"
        for text, rows in windows.items():
            whole: list[PerplexityResult] = []
            if changed:
                whole = [evaluate_method(f"{name}, read uncompressed", model, rows, METHODS["full"], context, 1.0)]
            for ratio in arguments.ratios:
                results[text, ratio] += [evaluate_semtoken(name, model, rows, context, ratio), *whole]
    return results


def measure_objective(objective: str, checkpoint: str, steps: int) -> str:
    """A line of the table: one row a step, LoRA in bfloat16, on random tokens; the first step warms up."""
    arguments = AdaptationArguments(checkpoint, "", objective=objective, model_dtype="bfloat16")
    training = AdaptationTrainingArguments(per_device_train_batch_size=1)
    student = load_student(arguments)
    choose_trainable(student, "lora", arguments.lora_rank, arguments.lora_alpha)
    leave_casts_to_autocast(student)
    module, collate, length, per_row = build_objective(arguments, training, student, None)
    device = training.device
    module.to(device).train()
    generator = torch.Generator().manual_seed(0)
    tokens, flops, seconds = 0, 0, 0.0
    for index in range(steps + 1):
        ids = torch.randint(student.config.vocab_size, (length,), generator=generator)
        batch = collate([{"input_ids": ids, "index": index}])
        batch["input_ids"] = batch["input_ids"].to(device)
        start, counter = time.perf_counter(), FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
        with counter, torch.autocast(device.type, torch.bfloat16):
            loss = module(**batch)["loss"]
            loss.backward()
        float(loss)
        if index:
            tokens, flops = tokens + batch["input_ids"].shape[1], flops + counter.get_total_flops()
            seconds += time.perf_counter() - start
    targets = steps * per_row
    return (
        f"| {objective} | {seconds / steps:.1f} | {tokens / seconds:.0f} | {targets / seconds:.0f} "
        f"| {flops / steps / 1e12:.2f} | {targets / flops * 1e12:.0f} |"
    )


def objectives_table(arguments: argparse.Namespace) -> list[str]:
    lines = ["# Objectives", ""]
    lines.append("| objective | seconds a row | tokens/s | targets/s | TFLOP a row | targets/TFLOP |")
    lines.append("|---|---|---|---|---|---|")
    return lines + [measure_objective(name, arguments.checkpoint, arguments.objectives) for name in OBJECTIVES]


def main() -> None:
    arguments = parse_arguments()
    if arguments.objectives:
        publish_report(objectives_table(arguments), arguments.output)
        return
    windows = load_windows(arguments, AutoTokenizer.from_pretrained(arguments.checkpoint))
    lines = ["# Adaptation", ""]
    lines.append(
        f"Context-compressed perplexity: {arguments.context} context and {arguments.target} target tokens a window; "
        "the targets are scored whole and never seen by the planner. Cost: perplexity against the full context read by "
        "the checkpoint before adaptation. Spread: standard error of the paired loss difference over windows."
    )
    if arguments.set_fields:
        lines += ["", f"Every checkpoint with `{' '.join(arguments.set_fields)}`, whatever it was adapted with."]
    for (text, ratio), results in measure(arguments, windows).items():
        full, none = results[:2]
        lines += ["", f"## {text}, ratio {ratio}, {len(full.losses)} windows", ""]
        lines += perplexity_table(results, full, none)
    publish_report(lines, arguments.output)


if __name__ == "__main__":
    main()
