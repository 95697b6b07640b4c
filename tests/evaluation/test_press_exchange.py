"""The presses' side of an evaluation, without kvpress: a press that prunes nothing stands in for it."""

from __future__ import annotations

import json
import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import decoders
from transformers import LlamaForCausalLM

from semtoken_hf.evaluation import cells, press_exchange
from semtoken_hf.evaluation.configuration import EvaluationConfig
from semtoken_hf.evaluation.methods import METHODS, PRESSES, press_methods
from semtoken_hf.evaluation.tasks import TASKS
from tests.fixtures.adapted import adapted_model
from tests.fixtures.scripts import load_script
from tests.fixtures.text import PROSE
from tests.fixtures.tiny import random_ids, tiny_model, tiny_tokenizer

RATIO = 2.0


@dataclass
class KeepAll:
    """Stands in for a press and prunes nothing."""

    compression_ratio: float = 0.0

    def __call__(self, model: Any) -> Any:
        return nullcontext()


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    return load_script("kvpress_run.py")


@pytest.fixture
def stub(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "kvpress", SimpleNamespace(**dict.fromkeys(PRESSES.values(), KeepAll)))


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> EvaluationConfig:
    """A tiny checkpoint with a few windows and needles, exported."""
    folder = tmp_path_factory.mktemp("presses")
    model = tiny_model(max_position_embeddings=1400, segmentation_mode="greedy")
    model.save_pretrained(folder / "semtoken")
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save_pretrained(folder / "semtoken")
    (folder / "wikitext-103").mkdir()
    (folder / "wikitext-103" / "test.txt").write_text(PROSE)
    config = EvaluationConfig(
        checkpoint=str(folder / "semtoken"),
        data_dir=str(folder),
        output_dir=str(folder / "evaluation"),
        tasks=["wikitext", "needle"],
        ratios=[RATIO],
        curve_ratios=[RATIO],
        fraction=0.05,
        task_fractions=["wikitext=20"],
        context_length=120,
        target_length=30,
        max_new_tokens=6,
    )
    cells._make_prompts.cache_clear()
    press_exchange.export_for_presses(config, config.tasks)
    return config


def exchange(config: EvaluationConfig) -> Path:
    return config.folder / "kvpress"


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def budget_of_first(context: int) -> int:
    """Slots that SemToken may leave of a context if a press behind it adds as much."""
    return math.ceil(context / math.sqrt(RATIO))


def logits_of(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **options).logits


def test_the_exported_model_is_the_plain_one_bit_for_bit(config):
    plain = LlamaForCausalLM.from_pretrained(exchange(config) / "model", dtype="auto").eval()
    ids = random_ids(1, 60)
    assert plain.dtype == torch.float32
    ours = logits_of(cells.load_model(config.checkpoint), ids, compression=False)
    assert torch.equal(logits_of(plain, ids), ours)
    assert not (exchange(config) / "adapted").exists()


def test_an_adapter_is_in_the_weights_of_the_model_that_reads_merged_slots(tmp_path):
    model = adapted_model()
    for name in ("model", "adapted"):
        press_exchange.save_plain(model, tmp_path / name, adapted=name == "adapted")
    plain, adapted = (LlamaForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("model", "adapted"))
    ids = random_ids(1, 80)
    assert torch.equal(logits_of(plain, ids), logits_of(model, ids, compression=False))
    with torch.no_grad():
        slots = model.compress(ids, target_ratio=2.0)
    ours = logits_of(model, ids, target_ratio=2.0, logits_to_keep=1)
    read = {"inputs_embeds": slots.inputs_embeds, "position_ids": slots.position_ids, "use_cache": False}
    read["attention_mask"] = slots.attention_mask
    torch.testing.assert_close(logits_of(adapted, None, **read)[:, -1:], ours, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits_of(plain, None, **read)[:, -1:], ours, atol=1e-2)


@pytest.mark.parametrize("task", ["wikitext", "needle"])
def test_prompts_and_compressed_contexts_are_those_of_the_evaluation(config, task):
    prompts = cells.load_prompts(config, task, some=True)
    lines = read_lines(exchange(config) / "prompts" / f"{task}.jsonl")
    assert len(lines) == len(prompts) > 1
    with safe_open(exchange(config) / "compressed" / f"{task}@2.safetensors", "pt") as file:
        for prompt, line in zip(prompts, lines, strict=True):
            assert (line["id"], line["ids"], line["target"]) == (prompt.id, prompt.ids.tolist(), prompt.target.tolist())
            assert line["slots"] == {"2": prompt.budget(RATIO)}
            assert line["answer_tokens"] == (0 if TASKS[task].is_perplexity else 6)
            context = prompt.length - max(line["question_length"], 1)
            positions, embeds = (file.get_tensor(f"{prompt.id}.{part}") for part in ("positions", "embeds"))
            assert len(positions) == budget_of_first(context)
            assert embeds.shape == (len(positions), 64)
            assert embeds.dtype == torch.float32
            assert (positions.diff() > 0).all()
            assert positions[-1] == context - 1
            assert float(file.metadata()[prompt.id]) > 0


def test_a_press_that_keeps_everything_reads_like_the_full_context(config, runner, stub):
    plan = json.loads((exchange(config) / "plan.json").read_text())
    whole = [c for c in runner.list_cells(plan) if c.press == "Knorm"]
    assert len(runner.list_cells(plan)) == 2 * len(press_methods())
    for cell in whole:
        runner.run_cell(exchange(config), cell)
    found = press_exchange.import_press_results(config)
    assert sorted(cell.name for cell in found) == sorted(cell.name for cell in whole)
    model, tokenizer = cells.load_model(config.checkpoint), cells.load_tokenizer(config.checkpoint)
    for task in config.tasks:
        lines = read_lines(config.folder / "cells" / task / "kvpress_Knorm@2.jsonl")
        behind = read_lines(config.folder / "cells" / task / "semtoken_Knorm@2.jsonl")
        for prompt, line, merged in zip(cells.load_prompts(config, task, some=True), lines, behind, strict=True):
            full = cells.read_prompt(model, tokenizer, TASKS[task], METHODS["full"], prompt, None, config)
            assert list(line) == list(merged) == [name for name in full if not name.endswith("_kept")]
            measured = ("nll", "read_seconds")
            assert {k: line[k] for k in line if k not in measured} == {k: full[k] for k in line if k not in measured}
            assert line["nll"] == pytest.approx(full["nll"], rel=1e-5)
            assert merged["nll"] != pytest.approx(full["nll"], rel=1e-5)
            fed = max(prompt.question_length, 1)
            assert 0 <= budget_of_first(prompt.length - fed) - (merged["slots"] - fed) < 8


def test_results_that_are_missing_or_of_other_prompts_are_refused(config, tmp_path):
    empty = EvaluationConfig(checkpoint=config.checkpoint, output_dir=str(tmp_path), tasks=["needle"])
    with pytest.raises(FileNotFoundError, match="kvpress_baselines"):
        press_exchange.import_press_results(empty)
    path = exchange(config) / "results" / "needle" / "kvpress_KeyDiff@2.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"id": "other"}) + "\n")
    with pytest.raises(ValueError, match="of other prompts"):
        press_exchange.import_press_results(config)
    path.unlink()
