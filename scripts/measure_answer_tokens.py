#!/usr/bin/env python
"""How often the answer to a question keeps slots of its own, with and without the question's say in the budget.

    python scripts/measure_answer_tokens.py --checkpoints static=model_cards/semtoken-llama-tiny minilm=DIR \\
        --data_dir data --output model_cards/semtoken-llama-tiny/answer_tokens.md

Planning alone: the language model is not read, and whole prompts are, however long. Beside each share of the gold
answer's tokens stands the same share of all tokens of the context: what chance would give.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from transformers import AutoTokenizer

from semtoken_hf import SpanPlanner
from semtoken_hf.evaluation.answer_tokens import shares_kept
from semtoken_hf.evaluation.configuration import EvaluationConfig
from semtoken_hf.evaluation.named_values import read_pairs
from semtoken_hf.evaluation.provenance import publish_report
from semtoken_hf.evaluation.tasks import TASKS

RATIOS = (2.4, 4.0)
# Title, fields of the configuration, and whether the question is marked or the protected tail has to do.
PLANS = (
    ("no question", {"query_weight": 0.0}, True),
    ("marked question, weight 1", {"query_weight": 1.0}, True),
    ("marked question, weight 2", {"query_weight": 2.0}, True),
    ("marked question, weight 4", {"query_weight": 4.0}, True),
    ("protected tail, weight 1", {"query_weight": 1.0}, False),
    ("the paper's budget, no question", {"query_weight": 0.0, "recency": 0.0}, True),
    ("the paper's budget, marked question, weight 1", {"query_weight": 1.0, "recency": 0.0}, True),
    ("the paper's budget, marked question, weight 4", {"query_weight": 4.0, "recency": 0.0}, True),
)
UNLIMITED = 10**9


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoints", required=True, nargs="+", metavar="NAME=FOLDER", help="checkpoints to plan with"
    )
    parser.add_argument(
        "--data_dir", required=True, help="folder with the task's file, as `semtoken evaluate` takes it"
    )
    parser.add_argument("--task", default="hotpotqa", choices=[name for name in TASKS if not TASKS[name].is_perplexity])
    parser.add_argument(
        "--limit", type=int, default=UNLIMITED, help="tokens of a prompt; a longer one loses its middle"
    )
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    folders = read_pairs(arguments.checkpoints, "checkpoints")
    config = EvaluationConfig(checkpoint=next(iter(folders.values())), data_dir=arguments.data_dir)
    tokenizer = AutoTokenizer.from_pretrained(config.checkpoint)
    prompts = TASKS[arguments.task].prompts(tokenizer, config.settings(arguments.task, arguments.limit))
    prompts = [prompt for prompt in prompts if prompt.answer.any()]
    lines = [
        "# Tokens of the gold answer that keep a slot of their own",
        "",
        f"{TASKS[arguments.task].title}: {len(prompts)} questions whose answer stands in the context verbatim, prompts "
        f"of {int(statistics.median(p.length for p in prompts)):,} tokens in the median. Planning alone. In brackets: "
        "of all tokens of the context, which is what chance gives. The question itself stays whole everywhere but for "
        "`protected tail`, where the last `keep_last` tokens stand for it.",
        "",
        "| encoder | budget | " + " | ".join(f"{ratio:g} tokens per slot" for ratio in RATIOS) + " |",
        "|---|---|" + "---|" * len(RATIOS),
    ]
    for name, folder in folders.items():
        with torch.no_grad():
            shares = shares_kept(SpanPlanner.from_pretrained(folder), prompts, PLANS, RATIOS)
        for title, _, _ in PLANS:
            cells = [f"{a:.1%} ({c:.1%}; {got:.2f} x)" for a, c, got in (shares[title, ratio] for ratio in RATIOS)]
            lines.append(f"| {name} | {title} | " + " | ".join(cells) + " |")
    publish_report(lines, arguments.output)


if __name__ == "__main__":
    main()
