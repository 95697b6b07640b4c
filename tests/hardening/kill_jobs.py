"""What the kill tests run and kill: tiny conversions, adaptations, evaluations and data sets.

Imported by the fork server, so that a child starts in milliseconds.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import matplotlib.figure  # noqa: F401 (for the fork server, as all of these)
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, BertTokenizerFast, LlamaConfig, LlamaForCausalLM

from semtoken_hf import SemTokenLlamaForCausalLM
from semtoken_hf.bulk import BulkOptions, compress_dataset
from semtoken_hf.conversion.checkpoint import convert_checkpoint
from semtoken_hf.evaluation.configuration import EvaluationConfig
from semtoken_hf.evaluation.evaluate import evaluate
from semtoken_hf.evaluation.jobs import read_records
from semtoken_hf.training.adaptation import adapt
from tests.conversion.checkpoints import VOCAB_SIZE, WORDPIECES, byte_level_tokenizer
from tests.fixtures.text import PROSE
from tests.fixtures.tiny import tiny_model, tiny_tokenizer
from tests.training.adaptation_runs import make_inputs, options

CHECKPOINT_FILES = {"trained.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
END_OF_PNG = b"IEND\xaeB`\x82"


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder, by its path."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def loads(folder: Path) -> bool:
    """Whether a folder can be taken for a checkpoint."""
    try:
        SemTokenLlamaForCausalLM.from_pretrained(folder)
    except Exception:  # whatever stops it
        return False
    return True


def check_leftovers(folder: Path, name: str, whole: Any) -> None:
    """What lies beside `name` is whole, or cannot be loaded."""
    for left in folder.glob(f"{name}.*-*"):
        if ".old-" not in left.name and contents(left) != whole:
            assert not loads(left), f"{left.name} is not whole and loads"


class Job:
    """A program that is killed.

    `prepare(inputs)` writes what it reads and `start(inputs, work, variant)` what is there before; `run` is the
    command, the same before and after a kill. `result(work)` is what must come out of it; `check(work, whole)` raises
    AssertionError where something half written passes for whole; `whole`: the result of a run that was not killed.
    `leftovers(work)` names what a finished run should not leave.
    """

    variants = ("",)

    def start(self, inputs: Path, work: Path, variant: str) -> None:
        work.mkdir()


class Convert(Job):
    """A Llama in shards; `overwrite` replaces an older conversion."""

    variants = ("new", "overwrite")

    def prepare(self, inputs: Path) -> None:
        torch.manual_seed(2)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "vocab_size": VOCAB_SIZE}
        LlamaForCausalLM(LlamaConfig(**sizes, **ids)).save_pretrained(inputs / "llama", max_shard_size="50KB")
        byte_level_tokenizer().save_pretrained(inputs / "llama")
        vocab = {piece: i for i, piece in enumerate([*WORDPIECES, *"abcdefghijklmnopqrstuvwxyz"])}
        BertTokenizerFast(vocab=vocab, do_lower_case=True).save_pretrained(inputs / "encoder")
        layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 24, "intermediate_size": 32}
        BertModel(BertConfig(vocab_size=len(vocab), **layers)).save_pretrained(inputs / "encoder")
        self._convert(inputs, inputs / "older", target_ratio=3.0)

    def _convert(self, inputs: Path, output: Path, **fields: Any) -> None:
        sources = inputs / "llama", inputs / "encoder"
        convert_checkpoint(*sources, output, max_shard_size="50KB", progress=False, overwrite=True, **fields)

    def start(self, inputs: Path, work: Path, variant: str) -> None:
        work.mkdir()
        if variant == "overwrite":
            shutil.copytree(inputs / "older", work / "out")

    def run(self, inputs: Path, work: Path, variant: str) -> None:
        self._convert(inputs, work / "out")

    def result(self, work: Path) -> Any:
        return contents(work / "out")

    def check(self, work: Path, whole: Any) -> None:
        found = contents(work / "out")
        if found and found != whole:
            older = contents(work.parent / "inputs" / "older")
            assert found == older, "half a checkpoint"
        assert not (work / "out").exists() or loads(work / "out")
        check_leftovers(work, "out", whole)

    def leftovers(self, work: Path) -> set[str]:
        return {p.name for p in work.iterdir()} - {"out"}


class Adapt(Job):
    """Four steps, an evaluation and a checkpoint after every second one."""

    variants = ("merger", "lora", "full")

    def prepare(self, inputs: Path) -> None:
        make_inputs(inputs)

    def run(self, inputs: Path, work: Path, variant: str) -> None:
        arguments = {"trainable": variant, "objective": "window", "tasks": "diminish", "evaluation_windows": 1}
        adapt(*options(inputs, work, arguments, max_steps=4, eval_steps=2, save_steps=2))

    def result(self, work: Path) -> Any:
        return {"model": contents(work / "model"), "curve": (work / "curve.csv").read_text()}

    def check(self, work: Path, whole: Any) -> None:
        if (work / "model").exists():
            assert contents(work / "model") == whole["model"], "half a model"
        check_leftovers(work, "model", whole["model"])
        for checkpoint in work.glob("checkpoint-*"):
            assert {p.name for p in checkpoint.iterdir()} >= CHECKPOINT_FILES, f"half a {checkpoint.name}"
            load_file(checkpoint / "trained.safetensors")
            for name in ("optimizer.pt", "scheduler.pt"):
                torch.load(checkpoint / name, weights_only=True)
            json.loads((checkpoint / "trainer_state.json").read_text())
        if (work / "curve.csv").exists():
            # Rows come one after the other, each once.
            assert whole["curve"].startswith((work / "curve.csv").read_text())
        if (work / "curve.png").exists():
            assert (work / "curve.png").read_bytes().endswith(END_OF_PNG)

    def leftovers(self, work: Path) -> set[str]:
        known = {"model", "checkpoint-4", "curve.csv", "curve.png", "adaptation.json", "tokens", ".lock"}
        return {p.name for p in work.iterdir()} - known


class Evaluate(Job):
    """Three ways to read a few windows of text and a few needles."""

    def prepare(self, inputs: Path) -> None:
        tiny_model(recent_window=8, max_position_embeddings=1100).save_pretrained(inputs / "checkpoint")
        tiny_tokenizer().save_pretrained(inputs / "checkpoint")
        (inputs / "text.txt").write_text(PROSE * 2)

    def run(self, inputs: Path, work: Path, variant: str) -> None:
        evaluate(self._config(inputs, work))

    def _config(self, inputs: Path, work: Path) -> EvaluationConfig:
        return EvaluationConfig(
            str(inputs / "checkpoint"),
            output_dir=str(work),
            tasks=["wikitext", "needle"],
            methods=["full", "truncation", "semtoken"],
            ablations=["none"],
            sources=[f"wikitext={inputs / 'text.txt'}"],
            ratios=[2.0],
            curve_ratios=[2.0, 4.0],
            context_length=64,
            target_length=16,
            task_fractions=["needle=0.05", "wikitext=0.4"],
            max_new_tokens=4,
            lengths=[0],
        )

    def result(self, work: Path) -> Any:
        (folder,) = work.iterdir()
        metrics = json.loads((folder / "metrics.json").read_text())
        del metrics["provenance"], metrics["config"]["output_dir"]
        for cell in metrics["cells"]:
            drop_seconds(cell)
        return {"metrics": metrics, "cells": {cell_name(p): self._lines(p) for p in sorted(folder.rglob("*.jsonl"))}}

    def _lines(self, path: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in record.items() if k != "read_seconds"} for record in read_records(path)]

    def check(self, work: Path, whole: Any) -> None:
        for path in work.rglob("*.jsonl"):
            assert self._lines(path) == whole["cells"][cell_name(path)], f"half of {path.name}"
        for path in work.rglob("*.json"):
            json.loads(path.read_text())
        for path in work.rglob("report.html"):
            assert path.read_text().rstrip().endswith("</html>")
        for path in work.rglob("*.png"):
            assert path.read_bytes().endswith(END_OF_PNG)

    def leftovers(self, work: Path) -> set[str]:
        (folder,) = work.iterdir()
        known = {".jsonl", ".json", ".html", ".md", ".png", ".svg", ".lock"}
        files = [p for p in folder.rglob("*") if p.is_file()]
        return {p.name for p in files if p.suffix not in known and p.name not in known}


def cell_name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def drop_seconds(record: dict[str, Any]) -> None:
    """Take what differs between two runs out of a record of metrics.json, in groups within, too."""
    for name in [n for n in record if "second" in n]:
        del record[name]
    for value in record.values():
        for inner in value.values() if isinstance(value, dict) else []:
            if isinstance(inner, dict):
                drop_seconds(inner)


class CompressDataset(Job):
    """Six documents in three shards."""

    variants = ("prefixes", "prompt-embeds")

    def prepare(self, inputs: Path) -> None:
        tiny_model().save_pretrained(inputs / "checkpoint")
        tiny_tokenizer().save_pretrained(inputs / "checkpoint")
        (inputs / "texts").mkdir()
        for number in range(6):
            (inputs / "texts" / f"{number}.txt").write_text(PROSE[60 * number : 60 * number + 150])

    def run(self, inputs: Path, work: Path, variant: str) -> None:
        options = BulkOptions(str(inputs / "checkpoint"), str(inputs / "texts"), kind=variant, shard_size=2)
        compress_dataset(options, work / "out", progress=False)

    def result(self, work: Path) -> Any:
        return {name: digest for name, digest in contents(work / "out").items() if name != ".lock"}

    def check(self, work: Path, whole: Any) -> None:
        known = {name: digest for name, digest in self.result(work).items() if ".tmp-" not in name}
        assert known.items() <= whole.items(), "half a file"
        assert "manifest.json" in known or not known, "shards before the manifest"

    def leftovers(self, work: Path) -> set[str]:
        return set(self.result(work)) - {"manifest.json", *(f"shard-0000{n}.safetensors" for n in range(3))}


JOBS: dict[str, Any] = {
    "convert": Convert(),
    "adapt": Adapt(),
    "evaluate": Evaluate(),
    "compress-dataset": CompressDataset(),
}
