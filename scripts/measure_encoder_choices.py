#!/usr/bin/env python
"""What a cheaper encoder costs in quality: its dtype, layers, windows and radius, and the static table.

    python scripts/measure_encoder_choices.py --checkpoint model_cards/semtoken-llama-tiny --encoder all-MiniLM-L6-v2 \\
        --text_file wiki.valid.txt --data_dir data --output model_cards/semtoken-llama-tiny/encoder_choices.md

Every choice plans for the checkpoint's own language model, on its vocabulary. The first row is the reference.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from semtoken_hf import SpanPlanner
from semtoken_hf.configuration_semtoken import SemTokenConfigMixin
from semtoken_hf.conversion.planner import planner_on_vocabulary
from semtoken_hf.evaluation.answer_tokens import shares_kept
from semtoken_hf.evaluation.compressed_perplexity import context_gain_kept, evaluate_method, evaluate_references
from semtoken_hf.evaluation.configuration import EvaluationConfig
from semtoken_hf.evaluation.methods import Compressed
from semtoken_hf.evaluation.prompts import Prompt
from semtoken_hf.evaluation.provenance import publish_report
from semtoken_hf.evaluation.tasks import TASKS
from semtoken_hf.evaluation.texts import make_windows
from semtoken_hf.span_planner import SpanPlan

WHOLE = "float32, all layers"
CHOICES: dict[str, dict[str, Any]] = {
    WHOLE: {"encoder_dtype": "float32"},
    "bfloat16, all layers": {},
    **{f"bfloat16, {layers} layers": {"encoder_layers": layers} for layers in (3, 2, 1)},
    "bfloat16, all layers, windows of 64": {"encoder_window": 64},
    "bfloat16, all layers, windows of 32": {"encoder_window": 32, "encoder_overlap": 8},
    "bfloat16, 3 layers, windows of 64": {"encoder_layers": 3, "encoder_window": 64},
    **{f"bfloat16, 3 layers, k = {k}": {"encoder_layers": 3, "fingerprint_radius": k} for k in (0, 4)},
    "static": {"encoder_kind": "static"},
}
# Title, fields of the configuration, and whether the question is marked.
PLANS = (
    ("with the question's say", {"query_weight": 1.0}, True),
    ("the same, paper's budget", {"query_weight": 1.0, "recency": 0.0}, True),
)
MERGE = {"merge_mode": "representative", "merger_base": "representative"}
UNLIMITED = 10**9


@dataclass
class Row:
    """What one choice gives.

    Attributes:
        agreement: share of the reference's slot boundaries that this plan has, too, where tokens may merge; by recency.
        gain: context gain kept, by recency.
        answers: share of the answer's tokens that keep a slot of their own, one for each of `PLANS`.
        microseconds: of the encoder per token, one for each repetition.
    """

    agreement: dict[float, float] = field(default_factory=dict)
    gain: dict[float, float] = field(default_factory=dict)
    answers: list[float] = field(default_factory=list)
    microseconds: list[float] = field(default_factory=list)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="language model, tokenizer and compression fields")
    parser.add_argument("--encoder", required=True, help="folder or Hub id of the transformer encoder")
    parser.add_argument("--text_file", required=True, type=Path)
    parser.add_argument("--data_dir", required=True, help="folder with the task's file")
    parser.add_argument("--task", default="hotpotqa", choices=[name for name in TASKS if not TASKS[name].is_perplexity])
    parser.add_argument("--choices", nargs="+", choices=list(CHOICES), default=list(CHOICES), metavar="CHOICE")
    parser.add_argument("--ratio", type=float, default=2.4)
    parser.add_argument("--context", type=int, default=1792, help="context tokens of a window")
    parser.add_argument("--target", type=int, default=256, help="scored tokens of a window")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=4096, help="length of the prompt that is timed")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    return parser.parse_args()


def build_planners(config: Any, tokenizer: Any, encoder: str, names: list[str]) -> dict[str, SpanPlanner]:
    """The planner of each choice, else with the checkpoint's own compression fields."""
    own = {f.name: getattr(config, f.name) for f in fields(SemTokenConfigMixin)}
    for name in ("encoder_config", "encoder_dtype", "adapter_subfolder", "adapted_for"):
        del own[name]
    return {
        name: planner_on_vocabulary(tokenizer, encoder, **{**own, **MERGE, **CHOICES[name]})
        for name in tqdm(names, desc="encoders")
    }


def boundaries(plan: SpanPlan) -> Tensor:
    """bool: where slots begin, among the tokens that may merge."""
    starts = torch.zeros_like(plan.layout.solo)
    starts[plan.spans.first] = True
    return starts[plan.layout.joinable]


def agreement(planners: tuple[SpanPlanner, SpanPlanner], contexts: Tensor, ratio: float, recency: float) -> float:
    """Mean share of the second planner's boundaries that the first has, over contexts int64 [W, T]."""
    shares = []
    for planner in planners:
        planner.config.recency = recency
    for ids in contexts:
        ours, theirs = (boundaries(planner.plan(ids[None], target_ratio=ratio)) for planner in planners)
        shares.append(float((ours & theirs).sum() / theirs.sum()))
    return statistics.fmean(shares)


def measure_times(planners: dict[str, SpanPlanner], ids: Tensor, repetitions: int) -> dict[str, list[float]]:
    """Microseconds of the encoder per token, in turn, after one round to warm up."""
    layouts = {name: planner.plan(ids[None]).layout for name, planner in planners.items()}
    times: dict[str, list[float]] = {name: [] for name in planners}
    for repetition in range(repetitions + 1):
        for name, planner in planners.items():
            start = time.perf_counter()
            planner.encoder(ids, layouts[name])
            if repetition:
                times[name].append(1e6 * (time.perf_counter() - start) / len(ids))
    return times


def find_prompts(arguments: argparse.Namespace, tokenizer: Any) -> list[Prompt]:
    """The first questions whose answer stands in the context."""
    config = EvaluationConfig(checkpoint=arguments.checkpoint, data_dir=arguments.data_dir)
    prompts = TASKS[arguments.task].prompts(tokenizer, config.settings(arguments.task, UNLIMITED))
    return [prompt for prompt in prompts if prompt.answer.any()][: arguments.questions]


@torch.no_grad()
def measure(arguments: argparse.Namespace) -> tuple[dict[str, Row], int]:
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32).eval()
    planners = build_planners(
        model.config, tokenizer, arguments.encoder, list(dict.fromkeys([WHOLE, *arguments.choices]))
    )
    ids = torch.tensor(
        tokenizer(arguments.text_file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    )
    windows = make_windows(ids, arguments.context, arguments.target, tokenizer.bos_token_id, arguments.windows)
    prompts = find_prompts(arguments, tokenizer)
    full, none = evaluate_references(model, windows, arguments.context, [arguments.ratio])[arguments.ratio][:2]
    rows = {name: Row() for name in planners}
    for name, planner in planners.items():
        row = rows[name]
        contexts, shares = windows[:, : arguments.context], shares_kept(planner, prompts, PLANS, [arguments.ratio])
        row.answers = [shares[title, arguments.ratio][0] for title, *_ in PLANS]
        model.base_model.semantic_encoder = planner.encoder
        for recency in (model.config.recency, 0.0):
            row.agreement[recency] = agreement((planner, planners[WHOLE]), contexts, arguments.ratio, recency)
            method = Compressed(name, fields={**MERGE, "recency": recency})
            result = evaluate_method(name, model, windows, method, arguments.context, arguments.ratio)
            row.gain[recency] = context_gain_kept(result, full, none)
        planner.config.recency = model.config.recency
    for name, times in measure_times(planners, ids[: arguments.tokens], arguments.repetitions).items():
        rows[name].microseconds = times
    return rows, len(prompts)


def report(rows: dict[str, Row], questions: int, arguments: argparse.Namespace) -> list[str]:
    recencies = list(rows[WHOLE].gain)
    same = [f"boundaries of the first row kept, recency {recency:g}" for recency in recencies]
    gains = [f"context gain kept, recency {recency:g}" for recency in recencies]
    columns = [*same, *gains, *(f"answer tokens kept {title}" for title, *_ in PLANS)]
    lines = [
        f"# Choices of encoder: {Path(arguments.encoder).name}",
        "",
        f"Plans at {arguments.ratio:g} tokens per slot; recency 0 is the paper's budget. Boundaries and gain: "
        f"`{arguments.text_file.name}`, {arguments.windows} windows of {arguments.context} + {arguments.target}, "
        f"the language model of `{Path(arguments.checkpoint).name}` with representatives, nothing trained on these "
        f"plans. Answer tokens: {TASKS[arguments.task].title}, {questions} questions, share of the gold answer with a "
        f"slot of its own. Time: the encoder alone on {arguments.tokens:,} tokens, medians of {arguments.repetitions} "
        f"alternating runs with {torch.get_num_threads()} threads.",
        "",
        "| encoder | " + " | ".join(columns) + " | us per token | / first row |",
        "|---" * (len(columns) + 3) + "|",
    ]
    slowest = statistics.median(rows[WHOLE].microseconds)
    for name, row in rows.items():
        shares = [*row.agreement.values(), *row.gain.values(), *row.answers]
        microseconds = statistics.median(row.microseconds)
        cells = [*(f"{share:.1%}" for share in shares), f"{microseconds:.1f}", f"{microseconds / slowest:.3f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    arguments = parse_arguments()
    rows, questions = measure(arguments)
    publish_report(report(rows, questions, arguments), arguments.output)


if __name__ == "__main__":
    main()
