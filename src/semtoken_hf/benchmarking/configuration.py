"""The configuration of a benchmark: one dataclass, mirrored by the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..evaluation.named_values import read_fields
from ..evaluation.option_names import dashed
from .shapes import SHAPES, dtype_of, shape_of
from .workloads import BATCHES, row_lengths

# Arguments that decide what a figure is, beside those in the name of its file.
SETTINGS = (
    "checkpoint",
    "text_file",
    "encoder",
    "encoder_kind",
    "dtype",
    "attn_implementation",
    "prefill_chunk_size",
    "overrides",
    "new_tokens",
)


@dataclass
class BenchmarkConfig:
    """What is measured, on what, and for how long."""

    output_dir: str = field(default="benchmark", metadata={"help": "folder of the results, one for each machine"})
    shapes: list[str] = field(
        default_factory=lambda: ["160m"], metadata={"help": f"of the models: {', '.join(SHAPES)}"}
    )
    lengths: list[int] = field(
        default_factory=lambda: [1024, 2048, 4096, 8192], metadata={"help": "tokens of the longest prompt of a batch"}
    )
    ratios: list[float] = field(default_factory=lambda: [2.4], metadata={"help": "tokens per slot"})
    batches: list[str] = field(
        default_factory=lambda: list(BATCHES),
        metadata={"help": "1, 4, or skewed: a long prompt and three of an eighth"},
    )
    checkpoint: str = field(
        default="model_cards/semtoken-llama-tiny",
        metadata={"help": "its tokenizer, compression fields and static encoder are used"},
    )
    text_file: str = field(
        default="scripts/quickstart_chapter.txt", metadata={"help": "what is read, repeated if it is too short"}
    )
    encoder: str | None = field(
        default=None, metadata={"help": "folder or Hub id of a transformer encoder, instead of the checkpoint's"}
    )
    encoder_kind: str = field(
        default="transformer", metadata={"help": "what becomes of --encoder: transformer, or static (distilled)"}
    )
    encoder_layers: int | None = field(default=None, metadata={"help": "of --encoder, the first ones; all if unset"})
    overrides: list[str] = field(
        default_factory=list, metadata={"help": "FIELD=VALUE: compression fields instead of the checkpoint's"}
    )
    dtype: str | None = field(default=None, metadata={"help": "of the weights; the shape's if unset"})
    device: str | None = field(default=None, metadata={"help": "cuda where there is one, if unset"})
    attn_implementation: str = field(default="sdpa", metadata={"help": "attention of plain Llama and of SemToken"})
    prefill_chunk_size: int | None = field(default=None, metadata={"help": "columns that a prefill reads at a time"})
    new_tokens: int = field(default=64, metadata={"help": "of a whole generate"})
    repetitions: int = field(default=7, metadata={"help": "rounds at most; fewer where a round is long"})
    max_seconds: float = field(
        default=300.0,
        metadata={"help": "for the rounds of a cell; a variant predicted to take longer alone is skipped"},
    )
    stage_only: bool = field(default=False, metadata={"help": "the compression stage alone, at --stage-lengths"})
    stage_lengths: list[int] = field(
        default_factory=lambda: [8192, 32768, 131072, 262144, 524288, 1048576], metadata={"help": "of --stage-only"}
    )
    compile: bool = field(default=False, metadata={"help": "torch.compile of stage and decoding, beside eager"})
    report: bool = field(default=False, metadata={"help": "only render the report of what is already measured"})

    def __post_init__(self) -> None:
        for name in self.shapes:
            shape_of(name)
        if self.dtype is not None:
            dtype_of(self.dtype)
        for ratio in self.ratios:
            if not ratio > 1:
                raise ValueError(f"--ratios are tokens per slot, more than 1; got {ratio}")
        for name in self.batches:
            for length in self.lengths:
                row_lengths(name, length)
        for option in ("repetitions", "max_seconds"):
            if not getattr(self, option) > 0:
                raise ValueError(f"--{dashed(option)} must be more than 0, got {getattr(self, option)}")
        if self.new_tokens < 2:
            raise ValueError(f"--new-tokens must be at least 2 to have a step of decoding, got {self.new_tokens}")
        if not self.stage_lengths or min(self.stage_lengths) < 1:
            raise ValueError(f"--stage-lengths must be prompt lengths of at least 1 token, got {self.stage_lengths}")
        if self.encoder_layers is not None and self.encoder is None:
            raise ValueError("--encoder-layers are those of --encoder, which is not given")
        if self.encoder_kind not in ("transformer", "static"):
            raise ValueError(f"--encoder-kind must be transformer or static, got {self.encoder_kind!r}")

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def encoder_name(self) -> str:
        """What reports and files call the encoder."""
        if self.encoder is None:
            return "static"
        name = Path(self.encoder).name + ("" if self.encoder_layers is None else f"-{self.encoder_layers}-layers")
        return name if self.encoder_kind == "transformer" else f"{name}-static"

    @property
    def fields(self) -> dict[str, Any]:
        """The compression fields of `overrides`.

        Raises:
            ValueError: one is not FIELD=VALUE.
        """
        return read_fields(self.overrides, "overrides")

    def settings(self) -> dict[str, Any]:
        """Results that were measured with other ones are measured again."""
        given = {name: getattr(self, name) for name in SETTINGS}
        if self.encoder_layers is not None:
            given["encoder_layers"] = self.encoder_layers
        return {**given, "device": str(self.torch_device), "threads": torch.get_num_threads()}


__all__ = ["BenchmarkConfig"]
