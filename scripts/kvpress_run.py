#!/usr/bin/env python
"""Read exported prompts with the presses of kvpress, in its own environment, where semtoken_hf is not installed.

    python scripts/kvpress_run.py EVALUATION/FOLDER/kvpress

A press prunes the cache of a plain Llama after a full prefill of the context; the question is read behind it. What is
in the folder stands in `semtoken_hf/evaluation/press_exchange.py`; `scripts/kvpress_baselines.sh` makes it and takes
the results back. A killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
import time
import warnings
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "semtoken_hf"


def load_helper(name: str) -> Any:
    """A module of `semtoken_hf` by its path: the package itself needs a newer Transformers."""
    spec = importlib.util.spec_from_file_location(f"semtoken_{Path(name).name}", PACKAGE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


continuation, jobs = load_helper("evaluation/continuation"), load_helper("evaluation/jobs")
cache_bytes = load_helper("cache_semtoken").cache_bytes


@dataclass(frozen=True)
class Cell:
    """One file of results.

    Attributes:
        task: name of a file of prompts.
        kind: "kvpress" for the press alone, "semtoken" behind SemToken.
        press: name of the press in results.
        press_class: its class in kvpress.
        ratio: tokens per slot of the whole prompt, as text.
    """

    task: str
    kind: str
    press: str
    press_class: str
    ratio: str

    @property
    def name(self) -> str:
        return f"{self.task}/{self.kind}_{self.press}@{self.ratio}"

    def path(self, folder: Path) -> Path:
        return folder / "results" / f"{self.name}.jsonl"


def list_cells(plan: dict[str, Any]) -> list[Cell]:
    return [
        Cell(task, kind, press, press_class, ratio)
        for task, ratios in plan["tasks"].items()
        for ratio in ratios
        for kind in ("kvpress", "semtoken")
        for press, press_class in plan["presses"].items()
        if kind == "kvpress" or press not in plan["replaying"]
    ]


@lru_cache(maxsize=2)
def load_model(folder: Path) -> Any:
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype="auto")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


@lru_cache(maxsize=1)
def open_compressed(file: Path) -> Any:
    return safe_open(file, "pt")


def run_cell(folder: Path, cell: Cell) -> None:
    """Read every prompt of a cell, from where a killed run stopped."""
    prompts = {prompt["id"]: prompt for prompt in jobs.read_records(folder / "prompts" / f"{cell.task}.jsonl")}
    jobs.complete_records(cell.path(folder), prompts, partial(read_prompt, folder, cell), cell.name)


@torch.no_grad()
def read_prompt(folder: Path, cell: Cell, prompt: dict[str, Any]) -> dict[str, Any]:
    """What a press makes of one prompt, as a raw line of results."""
    ids = torch.tensor(prompt["ids"])
    fed = max(prompt["question_length"], 1)
    before, is_merged = 0.0, False
    if cell.kind == "semtoken":
        file = open_compressed(folder / "compressed" / f"{cell.task}@{cell.ratio}.safetensors")
        embeds, positions = (file.get_tensor(f"{prompt['id']}.{part}") for part in ("embeds", "positions"))
        before, is_merged = float(file.metadata()[prompt["id"]]), len(positions) < len(ids) - fed
    # An adapter acts on prompts in which something was merged, and on nothing else.
    model = load_model(folder / ("adapted" if is_merged and (folder / "adapted").exists() else "model"))
    ids = ids.to(model.device)
    if cell.kind == "kvpress":
        context, positions = {"input_ids": ids[None, :-fed]}, torch.arange(len(ids) - fed)
    else:
        context = {"inputs_embeds": embeds.to(model.device, model.dtype)[None]}
    positions = positions.to(model.device)[None]
    press = make_press(cell.press_class, positions.shape[1], prompt["slots"][cell.ratio] - fed, int(positions[0, -1]))
    start = clock()
    prefill = read_pressed(model, context, positions, ids[-fed:], press)
    seconds = before + clock() - start
    held = prefill.cache.get_seq_length()
    return {
        "id": prompt["id"],
        "slots": prefill.slots,
        # Presses that mask entries hold them all here; what counts is what they would have to hold.
        "kv_bytes": cache_bytes(prefill.cache) * prefill.slots // held,
        "read_seconds": round(seconds, 5),
        **continued(model, prefill, prompt),
    }


def continued(model: Any, prefill: Any, prompt: dict[str, Any]) -> dict[str, Any]:
    """Likelihood of the target and the greedy answer, each if the prompt has one."""
    record: dict[str, Any] = {}
    if prompt["target"]:
        target = torch.tensor(prompt["target"], device=model.device)
        record["nll"] = float(continuation.score_target(model, prefill, target).sum())
        record["scored"] = len(target)
    if prompt["answer_tokens"]:
        eos = model.config.eos_token_id
        ends = set(eos) if isinstance(eos, list) else {eos}
        record["answer_ids"] = continuation.decode_greedily(
            model, prefill, prompt["answer_tokens"], lambda ids: ids[-1] in ends
        )
    return record


def make_press(press_class: str, length: int, kept: int, last: int) -> Any:
    """A press with its default parameters that leaves `kept` of `length` entries in every layer and head.

    It leaves one where `kept` is smaller, and all where `kept` is not less than `length` or the press asks for a longer
    context.

    Args:
        last: position of the last entry.
    """
    import kvpress

    kind = getattr(kvpress, press_class)
    needed = max(getattr(kind, "window_size", 0), getattr(kind, "n_sink", 0))
    kept = max(kept, 1)
    if kept < length <= needed:
        warnings.warn(
            f"{press_class} needs contexts of more than {needed} tokens: shorter ones stay whole", stacklevel=2
        )
        kept = length
    # kvpress keeps int(length * (1 - ratio)): half an entry above survives rounding.
    press = kind(compression_ratio=0.0 if kept >= length else 1 - (kept + 0.5) / length)
    if hasattr(press, "apply_avg_rope"):
        # ExpectedAttention counts entries to learn where future queries will be; merged slots stand for more tokens.
        rotate = press.apply_avg_rope
        press.apply_avg_rope = lambda module, mean, covariance, _: rotate(module, mean, covariance, last + 1)
    return press


def read_pressed(model: Any, context: dict[str, Tensor], positions: Tensor, question: Tensor, press: Any) -> Any:
    """A `Prefill` of a context that is pruned behind its prefill, and of the question, which is read after that.

    Args:
        model: a plain causal language model.
        context: `input_ids` int64 [1, m] or `inputs_embeds` float [1, m, H].
        positions: int64 [1, m], original positions, gapped where slots were merged.
        question: int64 [q], q >= 1; its positions follow the last one of the context.
        press: called with the model, a context manager.

    Raises:
        RuntimeError: the layers hold different numbers of entries.
    """
    cache: Any = DynamicCache(config=model.config)
    with press(model):
        model(
            **context,
            position_ids=positions,
            # Explicit: without a mask, gapped positions would be read as packed sequences.
            attention_mask=torch.ones_like(positions),
            past_key_values=cache,
            logits_to_keep=1,
        )
    held = {layer.keys.shape[-2] for layer in cache.layers}
    if len(held) > 1:
        raise RuntimeError(f"the press left {sorted(held)} entries in different layers; one number can be compared")
    kept, first = held.pop() - masked_entries(model), int(positions[0, -1]) + 1
    logits = continuation.extend(model, continuation.Prefill(cache, None, first, kept), question, 0)
    return continuation.Prefill(cache, logits[-1], first + len(question), kept + len(question))


def masked_entries(model: Any) -> int:
    """Entries that a press has masked instead of removing them: the mean over layers and heads, rounded."""
    layers = model.model.layers
    masked = [getattr(layer.self_attn, "masked_key_indices", None) for layer in layers]
    total = sum(0 if indices is None else len(indices[0]) for indices in masked)
    return round(total / (len(layers) * model.config.num_key_value_heads))


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="made by kvpress_exchange.py export")
    parser.add_argument("--threads", type=int, help="of PyTorch, all workers together; its own choice if unset")
    arguments = parser.parse_args()
    if not (arguments.folder / "plan.json").exists():
        sys.exit(f"error: there is no plan.json in {arguments.folder}: run kvpress_exchange.py export first")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    plan = json.loads((arguments.folder / "plan.json").read_text())
    versions = {package: version(package) for package in ("kvpress", "transformers", "torch")}
    versions["python"] = platform.python_version()
    temporary = arguments.folder / "environment.json.tmp"
    temporary.write_text(json.dumps(versions, indent=1) + "\n")
    temporary.replace(arguments.folder / "environment.json")
    cells = list_cells(plan)
    missing = [cell for cell in cells if not cell.path(arguments.folder).exists()]
    jobs.run_jobs(partial(run_cell, arguments.folder), missing, plan["workers"], len(cells) - len(missing))


if __name__ == "__main__":
    main()
