"""The configuration of an evaluation: one dataclass, mirrored by the command line."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .ablations import ABLATIONS
from .files import write_text
from .methods import METHODS
from .named_values import read_numbers, read_pairs
from .option_names import dashed
from .tasks import TASKS, TaskSettings
from .tasks.sources import read_text

RATIOS = (2.4, 4.0)
DTYPES = ("auto", "float32", "bfloat16")
CURVE = (1.5, 2.0, 2.4, 3.0, 4.0, 6.0, 8.0)


@dataclass
class EvaluationConfig:
    """What is evaluated, on what, and how much of it."""

    checkpoint: str = field(metadata={"help": "SemToken checkpoint: a folder or a Hub id"})
    data_dir: str | None = field(default=None, metadata={"help": "folder with the tasks' files, under the usual names"})
    output_dir: str = field(default="evaluation", metadata={"help": "the results go to a folder in it"})
    tasks: list[str] = field(default_factory=lambda: ["all"], metadata={"help": f"all, or some of: {', '.join(TASKS)}"})
    methods: list[str] = field(
        default_factory=lambda: ["all"], metadata={"help": f"all, or some of: {', '.join(METHODS)}"}
    )
    ablations: list[str] = field(
        default_factory=lambda: ["all"], metadata={"help": f"all, none, or some of: {', '.join(ABLATIONS)}"}
    )
    checkpoints: list[str] = field(
        default_factory=list, metadata={"help": "NAME=FOLDER: further SemToken checkpoints of the same plain model"}
    )
    sources: list[str] = field(
        default_factory=list, metadata={"help": "TASK=FILE or TASK=HUB_ID, where the data folder has no such file"}
    )
    haystack: str | None = field(
        default=None, metadata={"help": "text that needles are hidden in and speed is measured on; else WikiText's"}
    )
    ratios: list[float] = field(default_factory=lambda: list(RATIOS), metadata={"help": "tokens per slot"})
    curve_ratios: list[float] = field(
        default_factory=lambda: list(CURVE), metadata={"help": "tokens per slot in perplexity tasks"}
    )
    fraction: float = field(default=1.0, metadata={"help": "of every task's examples, evenly spaced; in (0, 1]"})
    task_fractions: list[str] = field(
        default_factory=list, metadata={"help": "TASK=FRACTION: that of one task, times the one of all"}
    )
    context_length: int = field(default=1792, metadata={"help": "context tokens of a perplexity window"})
    target_length: int = field(default=256, metadata={"help": "scored tokens of a perplexity window"})
    max_new_tokens: int = field(default=64, metadata={"help": "no answer is longer, whatever its task allows"})
    lengths: list[int] = field(
        default_factory=lambda: [2048, 8192, 16384, 32768],
        metadata={"help": "prompt lengths at which speed and long contexts are measured; 0: not at all"},
    )
    dtype: str = field(
        default="auto", metadata={"help": "float32 or bfloat16, of the model; auto: float32, on a GPU as stored"}
    )
    seed: int = field(default=0, metadata={"help": "of generated data"})
    workers: int = field(
        default=1, metadata={"help": "processes that read prompts side by side; speed is measured alone"}
    )
    report: bool = field(default=False, metadata={"help": "only render the report of what is already measured"})

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"--fraction must be in (0, 1], got {self.fraction}")
        for ratio in (*self.ratios, *self.curve_ratios):
            if ratio < 1:
                raise ValueError(f"a ratio is at least 1 token per slot, got {ratio}")
        if self.data_dir is not None and not Path(self.data_dir).is_dir():
            raise ValueError(f"--data-dir must be a folder, and there is none at {self.data_dir}")
        if self.workers < 1:
            raise ValueError(f"--workers must be at least 1, got {self.workers}")
        self.lengths = [length for length in self.lengths if length]
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype must be one of {list(DTYPES)}, got {self.dtype!r}")
        for names, known, option in (
            (self.tasks, TASKS, "tasks"),
            (self.methods, METHODS, "methods"),
            (self.ablations, {**ABLATIONS, "none": None}, "ablations"),
        ):
            if unknown := [n for n in names if n != "all" and n not in known]:
                raise ValueError(f"--{dashed(option)} does not know {unknown}; it knows {list(known)}")
        self.source_of = read_pairs(self.sources, "sources")
        self.checkpoint_of = read_pairs(self.checkpoints, "checkpoints")
        self.fraction_of = read_numbers(self.task_fractions, "task_fractions")
        if unknown := [n for n in (*self.source_of, *self.fraction_of) if n not in TASKS]:
            raise ValueError(f"there is no task {unknown}; there are {list(TASKS)}")

    @property
    def folder(self) -> Path:
        """Where the results are: named by what every figure depends on. Tasks, methods and ratios are files in it."""
        shared = {
            name: value
            for name, value in asdict(self).items()
            if name not in ("checkpoint", "output_dir", "tasks", "methods", "ablations", "ratios", "curve_ratios")
            and name not in ("workers", "report", "lengths", "data_dir", "checkpoints", "sources", "haystack")
        }
        stamps = {name: checkpoint_stamp(c) for name, c in {"": self.checkpoint, **self.checkpoint_of}.items()}
        data = {task: source_stamp(source) for task in TASKS if (source := self.source(task))}
        data["haystack"] = source_stamp(str(self.settings("needle", 0).haystack))
        digest = hashlib.sha256(json.dumps([shared, stamps, data], sort_keys=True).encode()).hexdigest()[:8]
        parts = [
            Path(self.checkpoint).name,
            f"{self.context_length}+{self.target_length}",
            f"fraction{self.fraction:g}",
            f"seed{self.seed}",
            digest,
        ]
        return Path(self.output_dir) / "__".join(parts)

    def source(self, task: str) -> str | None:
        """File or Hub id of a task's data; None where the data folder has none, so that the Hub has to be named."""
        if task in self.source_of:
            return self.source_of[task]
        file = TASKS[task].file
        path = Path(self.data_dir) / file if self.data_dir and file else None
        return str(path) if path and path.exists() else None

    def read_haystack(self) -> str:
        """The text in which needles are hidden and on which speed is measured."""
        settings = self.settings("needle", 0)
        return read_text(str(settings.haystack), settings.haystack_name)

    def settings(self, task: str, limit: int) -> TaskSettings:
        return TaskSettings(
            source=self.source(task),
            haystack=self.haystack or self.source("wikitext"),
            haystack_name=None if self.haystack else TASKS["wikitext"].hub_name,
            limit=limit,
            context_length=self.context_length,
            target_length=self.target_length,
            fraction=min(1.0, self.fraction * self.fraction_of.get(task, 1.0)),
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
        )

    def ratios_of(self, task: str) -> list[float]:
        """Tokens per slot that a task is read at: those of the curve for texts."""
        return self.curve_ratios if TASKS[task].is_perplexity else self.ratios

    def path_of(self, checkpoint: str | None) -> str:
        """Where a further checkpoint is, by its name; None: the evaluation's own."""
        return self.checkpoint_of[checkpoint] if checkpoint else self.checkpoint

    def save(self) -> None:
        write_text(self.folder / "config.json", json.dumps(asdict(self), indent=1) + "\n")


def checkpoint_stamp(checkpoint: str) -> str:
    """Changes with the checkpoint: results of an older one are never taken for those of this one."""
    folder = Path(checkpoint)
    return _stamp([*folder.glob("config.json"), *folder.rglob("*.safetensors")]) or checkpoint


def source_stamp(source: str) -> str:
    """Changes with the data, wherever it lies; the id of a data set on the Hub stands for itself."""
    path = Path(source)
    return _stamp([path] if path.is_file() else path.rglob("*")) or source


def _stamp(files: Iterable[Path]) -> str:
    found = sorted(f for f in files if f.is_file())
    return "".join(_digest(f, f.stat().st_size, f.stat().st_mtime_ns) for f in found)


@functools.cache
def _digest(file: Path, size: int, changed: int) -> str:
    """Of a file's name and content; read once as long as size and time of change stay."""
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while chunk := handle.read(1 << 24):
            digest.update(chunk)
    return file.name + digest.hexdigest()


def chosen(names: list[str], known: Any) -> list[str]:
    """`names` in the order of the registry; "all" is all of it."""
    return [name for name in known if name in names or "all" in names]
