"""What goes to the environment of the kvpress baselines, and what comes back; `scripts/kvpress_run.py` runs there.

In the folder of the evaluation, below `kvpress/`:

- `plan.json`: the presses, which of them replay the ids of the context, the tasks with their ratios (as text), and how
  many processes read them.
- `model/`: the plain model of the checkpoint and its tokenizer. `adapted/`: the same with the adapter in its weights,
  if it has one.
- `prompts/{task}.jsonl`: `id`, `ids`, `question_length`, `target`, `answer_tokens`, and the `slots` of each ratio.
- `compressed/{task}@{ratio}.safetensors`: contexts that SemToken has compressed, for "SemToken, then press".
- `results/{task}/{method}@{ratio}.jsonl`, by the other side: `id`, `slots`, `kv_bytes`, `read_seconds`, and `nll`,
  `scored` and `answer_ids` where the task has them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..adapter_semtoken import ADAPTER_NAME, has_adapter, without_adapter
from ..conversion.checkpoint import causal_lm_class
from ..conversion.plain import plain_part, save_plain_tokenizer
from ..conversion.staging import remove_stale, staged_file, staged_folder
from .cells import Cell, end_of_answer, load_model, load_prompts, load_tokenizer, scored_answer
from .configuration import EvaluationConfig
from .files import write_text
from .jobs import as_line, read_records
from .methods import PRESSES, REPLAYING
from .methods.compressed import changed_fields
from .metrics import list_press_cells
from .prompts import Prompt
from .side_by_side import timed
from .tasks import TASKS


def export_for_presses(config: EvaluationConfig, tasks: Iterable[str]) -> Path:
    """Write what the presses need for `tasks`, at the configuration's ratios; returns the `kvpress` folder.

    Models and compressed contexts that are there from an earlier call stay.

    Raises:
        ValueError: a task has no data.
    """
    folder, model = config.folder / "kvpress", load_model(config.checkpoint, config.dtype)
    save_plain(model, folder / "model")
    # KVzip asks for its chat template.
    save_plain_tokenizer(config.checkpoint, folder / "model")
    if has_adapter(model):
        save_plain(model, folder / "adapted", adapted=True)
    plan: dict[str, Any] = {"presses": PRESSES, "replaying": REPLAYING, "workers": config.workers, "tasks": {}}
    for task in tasks:
        ratios = config.ratios_of(task)
        prompts = load_prompts(config, task, some=True)
        for ratio in ratios:
            save_compressed(model, prompts, ratio, folder / "compressed" / f"{task}@{ratio:g}.safetensors")
        lines = [as_line(exported(config, task, prompt, ratios)) for prompt in prompts]
        write_text(folder / "prompts" / f"{task}.jsonl", "".join(lines))
        plan["tasks"][task] = [f"{ratio:g}" for ratio in ratios]
    # Last: the other side starts from it.
    write_text(folder / "plan.json", json.dumps(plan, indent=1) + "\n")
    return folder


def exported(config: EvaluationConfig, task: str, prompt: Prompt, ratios: Iterable[float]) -> dict[str, Any]:
    """A prompt as a line of `prompts/{task}.jsonl`."""
    return {
        "id": prompt.id,
        "ids": prompt.ids.tolist(),
        "question_length": prompt.question_length,
        "target": prompt.target.tolist(),
        "answer_tokens": min(TASKS[task].answer_tokens(prompt), config.max_new_tokens),
        "slots": {f"{ratio:g}": prompt.budget(ratio) for ratio in ratios},
    }


def save_plain(model: Any, folder: Path, adapted: bool = False) -> None:
    """The plain model of a SemToken one, as its family's class loads it, in the dtype that `model` has now.

    Args:
        model: a SemToken model.
        folder: written once and whole.
        adapted: with the adapter in the weights: the model that reads a prompt in which something was merged.
    """
    if folder.exists():
        return
    state = without_adapter(model.state_dict()) | (adapted_weights(model) if adapted else {})
    config = plain_part(model.config.to_dict())
    with torch.device("meta"):
        plain = causal_lm_class(config)(config)
    # The encoder and the merger stay behind.
    plain.load_state_dict(state, strict=False, assign=True)
    plain.tie_weights()
    remove_stale(folder)
    with staged_folder(folder) as staged:
        plain.save_pretrained(staged)


def adapted_weights(model: Any) -> dict[str, Tensor]:
    """The weights that the adapter changes, changed, by their plain names."""
    layers = {n: m for n, m in model.named_modules() if ADAPTER_NAME in getattr(m, "lora_B", {})}
    return {f"{n}.weight": m.base_layer.weight.data + m.get_delta_weight(ADAPTER_NAME) for n, m in layers.items()}


@torch.no_grad()
def save_compressed(model: Any, prompts: list[Prompt], ratio: float, file: Path) -> None:
    """The contexts of `prompts` as SemToken's slots, at sqrt(ratio) tokens per slot: the press behind adds as much.

    Args:
        model: a SemToken model.
        prompts: their context is all but the question, or but the last token where there is no question.
        ratio: of both together.
        file: gets `{id}.embeds` float32 [m, H] and `{id}.positions` int64 [m] of every prompt, and in its metadata
            the seconds of every compression, by id; written once.
    """
    if file.exists():
        return
    tensors, seconds = {}, {}
    for prompt in tqdm(prompts, desc=f"compressing {file.stem}", leave=False, disable=None, mininterval=1):
        context = prompt.ids[: prompt.length - max(prompt.question_length, 1)]
        slots = math.ceil(len(context) / math.sqrt(ratio) - 1e-9)
        with changed_fields(model, target_ratio=1.0, max_slots=slots):
            taken, compressed = timed(lambda ids=context: model.compress(ids[None]))
        tensors[f"{prompt.id}.embeds"] = compressed.inputs_embeds[0].float().cpu().contiguous()
        tensors[f"{prompt.id}.positions"] = compressed.position_ids[0].cpu().contiguous()
        seconds[prompt.id] = f"{taken:.5f}"
    with staged_file(file) as staged:
        save_file(tensors, staged, metadata=seconds)


def import_press_results(config: EvaluationConfig) -> list[Cell]:
    """Turn what the presses wrote into cells of the evaluation; returns those that there are.

    Raises:
        FileNotFoundError: there is not one file of results.
        ValueError: a file was made from other prompts.
    """
    folder = config.folder
    raw = folder / "kvpress" / "results"
    cells = [cell for cell in list_press_cells(config) if (raw / f"{cell.name}.jsonl").exists()]
    if not cells:
        raise FileNotFoundError(f"no results in {raw}: scripts/kvpress_baselines.sh runs the presses first")
    for cell in cells:
        records = {record["id"]: record for record in read_records(raw / f"{cell.name}.jsonl")}
        prompts = load_prompts(config, cell.task, some=True)
        if records.keys() != {prompt.id for prompt in prompts}:
            raise ValueError(f"{raw / cell.name}.jsonl is of other prompts: delete it and run the presses again")
        lines = [as_line(imported(config, cell.task, prompt, records[prompt.id])) for prompt in prompts]
        write_text(cell.path(folder), "".join(lines))
    return cells


def imported(config: EvaluationConfig, task: str, prompt: Prompt, raw: dict[str, Any]) -> dict[str, Any]:
    """A line of results, as `cells.read_prompt` makes it, from a raw one; the answer ends where its task says."""
    record = {"id": prompt.id, "group": prompt.group, "tokens": prompt.length}
    record |= {name: raw[name] for name in ("slots", "kv_bytes", "read_seconds")}
    record["round_trip"] = prompt.round_trip
    if len(prompt.target):
        record |= {name: raw[name] for name in ("nll", "scored")}
    ids = raw.get("answer_ids")
    if ids:
        tokenizer = load_tokenizer(config.checkpoint)
        is_end = end_of_answer(load_model(config.checkpoint, config.dtype).config, tokenizer, TASKS[task], prompt)
        end = next((n for n in range(1, len(ids)) if is_end(ids[:n])), len(ids))
        record |= scored_answer(tokenizer, TASKS[task], prompt, ids[:end])
    return record


__all__ = ["export_for_presses", "import_press_results"]
