"""Running an evaluation: one file of results for every task, method and ratio; whole, or on its way and resumed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import semtoken_hf  # noqa: F401 (registers the classes)

from ..cache_semtoken import cache_bytes
from ..configuration_semtoken import encoder_positions
from ..conversion.source import check_semtoken
from .ablations import ABLATIONS, NEEDS_TRANSFORMER
from .configuration import EvaluationConfig, chosen
from .continuation import decode_greedily, score_target
from .jobs import complete_records, run_jobs
from .methods import METHODS, Method, press_methods
from .prompts import Prompt
from .side_by_side import timed
from .tasks import TASKS, Task, TaskSettings

# Ablations and presses read every fourth perplexity window; they are compared with the full context on the same ones.
WINDOW_STEP = 4


@dataclass(frozen=True)
class Cell:
    """One entry of the table.

    Attributes:
        task: name in the registry.
        method: name in the registry of methods or ablations, or "semtoken" for a further checkpoint.
        ratio: tokens per slot; None where the method has no budget.
        checkpoint: name of a further checkpoint; None: the evaluation's.
        ablation: group of an ablation; None: a method.
    """

    task: str
    method: str
    ratio: float | None
    checkpoint: str | None = None
    ablation: str | None = None

    @property
    def name(self) -> str:
        method = self.method if self.checkpoint is None else f"{self.method}.{self.checkpoint}"
        return f"{self.task}/{method}@{'all' if self.ratio is None else format(self.ratio, 'g')}"

    def path(self, folder: Path) -> Path:
        return folder / ("ablations" if self.ablation else "cells") / f"{self.name}.jsonl"


def method_of(cell: Cell) -> Method:
    return ABLATIONS[cell.ablation][cell.method] if cell.ablation else METHODS[cell.method]


def title_of(cell: Cell) -> str:
    """What tables call it."""
    title = press_methods().get(cell.method) or method_of(cell).title
    return title if cell.checkpoint is None else f"{title}, {cell.checkpoint}"


def list_cells(config: EvaluationConfig) -> list[Cell]:
    """Every cell that the configuration asks for, whether it can be run or not."""
    cells = []
    for task in chosen(config.tasks, TASKS):
        ratios = config.ratios_of(task)
        methods: list[tuple[str, str | None]] = [(m, None) for m in chosen(config.methods, METHODS)]
        if "semtoken" in chosen(config.methods, METHODS):
            methods += [("semtoken", name) for name in config.checkpoint_of]
        for method, checkpoint in methods:
            wanted = ratios if METHODS[method].has_budget else [None]
            cells += [Cell(task, method, ratio, checkpoint) for ratio in wanted]
        if TASKS[task].is_perplexity:
            cells += list_ablations(config, task)
    return cells


def list_ablations(config: EvaluationConfig, task: str) -> list[Cell]:
    """Ablations on a perplexity task, at the first ratio of the tables."""
    cells = []
    for group in chosen(config.ablations, ABLATIONS):
        if "none" in config.ablations:
            break
        on: list[str | None] = [] if group in NEEDS_TRANSFORMER else [None]
        if group in (*NEEDS_TRANSFORMER, "tau", "delta", "radius"):
            on += list(config.checkpoint_of)
        for checkpoint in on:
            for method, variant in ABLATIONS[group].items():
                ratio = config.ratios[0] if variant.has_budget else None
                cells.append(Cell(task, method, ratio, checkpoint, group))
    return cells


@functools.lru_cache(maxsize=2)
def load_model(checkpoint: str, dtype: str = "auto") -> Any:
    """A checkpoint in `dtype`; "auto" is float32 on the CPU and the checkpoint's own dtype on a GPU."""
    gpu = torch.cuda.is_available()
    chosen_dtype = "auto" if gpu and dtype == "auto" else {"auto": torch.float32}.get(dtype, dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=chosen_dtype)
    check_semtoken(model.config, checkpoint)
    # Short prompts are compressed like long ones: methods are compared at equal bytes.
    model.config.min_prompt_length = 0
    return model.to("cuda" if gpu else "cpu").eval()


@functools.lru_cache(maxsize=1)
def load_tokenizer(checkpoint: str) -> Any:
    return AutoTokenizer.from_pretrained(checkpoint)


def load_prompts(config: EvaluationConfig, task: str, some: bool = False) -> list[Prompt]:
    """The task's prompts; `some`: what ablations and presses read of them."""
    model = load_model(config.checkpoint, config.dtype)
    settings = config.settings(task, model.config.max_position_embeddings)
    prompts = _make_prompts(config.checkpoint, task, settings, model.device)
    return prompts[::WINDOW_STEP] if some and TASKS[task].is_perplexity else prompts


@functools.lru_cache(maxsize=1)
def _make_prompts(checkpoint: str, task: str, settings: TaskSettings, device: torch.device) -> list[Prompt]:
    return [prompt.to(device) for prompt in TASKS[task].prompts(load_tokenizer(checkpoint), settings)]


def why_not(config: EvaluationConfig, cell: Cell) -> str | None:
    """Why a cell cannot be run, or None."""
    if lacking := TASKS[cell.task].lacks(config.settings(cell.task, 0)):
        return lacking
    model = load_model(config.path_of(cell.checkpoint), config.dtype)
    reason = None if cell.ablation else method_of(cell).unfit(model)
    if cell.ablation in NEEDS_TRANSFORMER:
        longest = encoder_positions(model.config.encoder_config)
        if model.base_model.semantic_encoder.is_static:
            reason = "the encoder is static and reads no windows"
        elif longest is not None and ABLATIONS[cell.ablation][cell.method].fields["encoder_window"] > longest:
            reason = f"the encoder has {longest} positions"
    return f"{title_of(cell)}: {reason}" if reason else None


def run_cell(config: EvaluationConfig, cell: Cell) -> None:
    """Read every prompt of a cell; what a killed run has already read is kept."""
    path = cell.path(config.folder)
    if path.exists():
        return
    prompts = load_prompts(config, cell.task, some=cell.ablation is not None)
    model = load_model(config.path_of(cell.checkpoint), config.dtype)
    tokenizer, method = load_tokenizer(config.checkpoint), method_of(cell)

    def read(prompt: Prompt) -> dict[str, Any]:
        return read_prompt(model, tokenizer, TASKS[cell.task], method, prompt, cell.ratio, config)

    complete_records(path, {prompt.id: prompt for prompt in prompts}, read, cell.name)


def read_prompt(
    model: Any,
    tokenizer: Any,
    task: Task,
    method: Method,
    prompt: Prompt,
    ratio: float | None,
    config: EvaluationConfig,
) -> dict[str, Any]:
    """What one method makes of one prompt, as a line of results."""
    seconds, prefill = timed(lambda: method.read(model, prompt, prompt.budget(ratio or 1.0)))
    record: dict[str, Any] = {
        "id": prompt.id,
        "group": prompt.group,
        "tokens": prompt.length,
        "slots": prefill.slots,
        "kv_bytes": cache_bytes(prefill.cache),
        "read_seconds": round(seconds, 5),
        "round_trip": prompt.round_trip,
    }
    if prefill.kept is not None:
        record["question_kept"] = bool(prefill.kept[prompt.question].all())
        if prompt.answer.any():
            record["answer_kept"] = float(prefill.kept[prompt.answer].float().mean())
    if len(prompt.target):
        record["nll"] = float(score_target(model, prefill, prompt.target).sum())
        record["scored"] = len(prompt.target)
    length = min(task.answer_tokens(prompt), config.max_new_tokens)
    if length:
        is_end = end_of_answer(model.config, tokenizer, task, prompt)
        ids = decode_greedily(model, prefill, length, is_end)
        record |= scored_answer(tokenizer, task, prompt, ids)
    return record


def end_of_answer(model_config: Any, tokenizer: Any, task: Task, prompt: Prompt) -> Callable[[list[int]], bool]:
    """Whether generated ids, one or more, are a whole answer."""
    eos = model_config.eos_token_id
    ends = set(eos) if isinstance(eos, list) else {eos}
    return lambda ids: ids[-1] in ends or task.is_complete(tokenizer.decode(ids), prompt)


def scored_answer(tokenizer: Any, task: Task, prompt: Prompt, ids: list[int]) -> dict[str, Any]:
    """`answer` and `score` of a line of results."""
    answer = tokenizer.decode(ids, skip_special_tokens=True)
    return {"answer": answer, "score": task.score(answer, prompt)}


def run_cells(config: EvaluationConfig, cells: list[Cell]) -> None:
    """Run what is missing, in `workers` processes."""
    folder = config.folder
    missing = [cell for cell in cells if not cell.path(folder).exists()]
    run_jobs(functools.partial(run_cell, config), missing, config.workers, done=len(cells) - len(missing))
