"""What `scripts/adapt.py` accepts: the fields below beside every option of `transformers.TrainingArguments`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from ..evaluation.named_values import read_fields, read_numbers
from ..semantic_encoder import native_dtype
from .adaptation_data import BatchShape, PackedShape
from .task_schedule import TaskSchedule

TRAINABLE = ("merger", "lora", "full")
OBJECTIVES = ("packed", "window")
# Tried on the embedded checkpoint: ten times these undo what they should keep. The merger starts from zero.
LEARNING_RATES = {"merger": 1e-3, "lora": 3e-4, "full": 5e-5}


@dataclass
class AdaptationArguments:
    """What is adapted, on which text, to what."""

    checkpoint: str = field(metadata={"help": "converted SemToken folder or Hub id"})
    text: str = field(metadata={"help": "folder of .txt, .txt.xz or .md files, or the id of a `datasets` data set"})
    trainable: str = field(
        default="lora", metadata={"help": "merger, lora (merger + LoRA) or full", "choices": TRAINABLE}
    )
    text_config: str | None = field(default=None, metadata={"help": "configuration of the data set"})
    text_split: str = field(default="train", metadata={"help": "split of the data set"})
    text_column: str = field(default="text", metadata={"help": "column of the data set"})
    text_documents: int = field(default=20000, metadata={"help": "documents taken from the data set"})
    weights: list[str] = field(
        default_factory=list,
        metadata={"help": "FILE=WEIGHT, how often a file is passed over; FILE with or without suffix"},
    )
    held_out_share: float = field(default=0.01, metadata={"help": "of the documents, for the evaluation"})
    objective: str = field(
        default="packed",
        metadata={"help": "packed: every token of a row is scored; window: its last ones", "choices": OBJECTIVES},
    )
    sequence_length: int | None = field(
        default=None, metadata={"help": "packed: tokens of a row; 2,048 or what fits the model if unset"}
    )
    chunk_length: int = field(default=256, metadata={"help": "packed: tokens that are read whole at a time"})
    span_lengths: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8, 16, 32],
        metadata={"help": "packed: tokens of a span, drawn for each chunk; 1 keeps it whole"},
    )
    instructions: float | None = field(
        default=None,
        metadata={"help": "packed: share of rows that ask about the text; 0.25 where there is a chat template"},
    )
    context_length: int | None = field(
        default=None, metadata={"help": "longest context, of the evaluation, too; what fits the model if unset"}
    )
    min_context_length: int = field(default=384, metadata={"help": "window: shortest context"})
    target_length: int = field(default=256, metadata={"help": "tokens scored behind the context"})
    ratios: list[float] = field(
        default_factory=lambda: [1.5, 6.0], metadata={"help": "window: lowest and highest ratio"}
    )
    uncompressed_share: float | None = field(
        default=None, metadata={"help": "of the steps; a quarter with --trainable full, none where it cannot change"}
    )
    cross_entropy_weight: float = field(default=0.0, metadata={"help": "of the loss on the text, beside the KL"})
    set_fields: list[str] = field(
        default_factory=list, metadata={"help": "FIELD=VALUE of the configuration, such as position_mode=compact"}
    )
    lora_rank: int = 12
    lora_alpha: int = 24
    merger_learning_rate: float = field(default=1e-3, metadata={"help": "of the learned merger, whatever is trained"})
    merger_only_share: float = field(
        default=0.2, metadata={"help": "of the steps, at the start: the merger learns alone"}
    )
    tasks: str = field(
        default="none", metadata={"help": "window: auxiliary tasks: none, fixed, diminish or switch (MT2ST)"}
    )
    task_weight: float = 0.3
    task_rate: float = field(default=5.0, metadata={"help": "decay of `diminish`"})
    task_power: float = field(default=1.0, metadata={"help": "power of progress in `diminish`"})
    switch_at: float = field(default=0.4, metadata={"help": "share of the steps after which `switch` drops the tasks"})
    evaluation_windows: int = field(default=16, metadata={"help": "held-out windows of each evaluation"})
    count_flops: bool = field(default=False, metadata={"help": "count the FLOPs of every step"})
    model_dtype: str = field(
        default="float32", metadata={"help": "of the weights in memory; bfloat16 for big frozen bases"}
    )

    def __post_init__(self) -> None:
        if self.trainable not in TRAINABLE:
            raise ValueError(f"trainable must be one of {list(TRAINABLE)}, got {self.trainable!r}")
        if self.model_dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"model_dtype must be float32, bfloat16 or float16, got {self.model_dtype!r}")
        if self.model_dtype != "float32" and self.trainable == "full":
            raise ValueError("with trainable='full' the weights must be float32: updates would be lost in rounding")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {list(OBJECTIVES)}, got {self.objective!r}")
        if self.objective == "packed" and self.tasks != "none":
            raise ValueError("auxiliary tasks need objective='window'")
        self._check_packed()
        if len(self.ratios) != 2 or not 1 <= self.ratios[0] <= self.ratios[1]:
            raise ValueError(f"ratios must be two numbers, 1 <= lowest <= highest, got {self.ratios}")
        if self.uncompressed_share is None:
            self.uncompressed_share = 0.25 if self.trainable == "full" else 0.0
        if not 0 <= self.uncompressed_share < 1:
            raise ValueError(f"uncompressed_share must be in [0, 1), got {self.uncompressed_share}")
        if self.uncompressed_share and self.trainable != "full":
            raise ValueError(
                f"uncompressed_share must be 0 with trainable={self.trainable!r}, which cannot change the model"
            )
        read_numbers(self.weights, "weights")
        read_fields(self.set_fields, "set_fields")
        if self.min_context_length < 1 or self.target_length < 1 or self.evaluation_windows < 1:
            raise ValueError("min_context_length, target_length and evaluation_windows must be at least 1")
        self.schedule()

    def _check_packed(self) -> None:
        if self.chunk_length < 2:
            raise ValueError(f"chunk_length must be at least 2, got {self.chunk_length}")
        if not self.span_lengths or min(self.span_lengths) < 1:
            raise ValueError(f"span_lengths must be numbers >= 1, got {self.span_lengths}")
        if not 0 <= (self.instructions or 0.0) <= 1:
            raise ValueError(f"instructions must be in [0, 1], got {self.instructions}")
        if not 0 <= self.merger_only_share < 1:
            raise ValueError(f"merger_only_share must be in [0, 1), got {self.merger_only_share}")

    def schedule(self) -> TaskSchedule:
        return TaskSchedule(self.tasks, self.task_weight, self.task_rate, self.task_power, self.switch_at)

    def trained_lengths(self) -> dict[str, list]:
        """How much a slot stood for in training, for the record."""
        is_packed = self.objective == "packed"
        return {"span_lengths": list(self.span_lengths)} if is_packed else {"ratios": list(self.ratios)}

    def file_weights(self) -> dict[str, float]:
        return read_numbers(self.weights, "weights")

    def batch_shape(self, context_length: int, batch_size: int, seed: int) -> BatchShape:
        """The shape of batches for a context of at most `context_length` tokens.

        Raises:
            ValueError: the shortest context is longer than that.
        """
        if self.min_context_length > context_length:
            raise ValueError(
                f"min_context_length ({self.min_context_length}) must be at most the context of {context_length} tokens"
            )
        assert self.uncompressed_share is not None
        return BatchShape(
            context_length,
            self.min_context_length,
            self.target_length,
            (self.ratios[0], self.ratios[1]),
            self.uncompressed_share,
            batch_size,
            seed,
        )

    def instruction_share(self, tokenizer: Any) -> float:
        """Share of packed rows that ask about their text.

        Raises:
            ValueError: some are asked for, and the tokenizer has no chat template.
        """
        has_template = getattr(tokenizer, "chat_template", None) is not None
        if self.instructions and not has_template:
            raise ValueError("instructions need a tokenizer with a chat template: set instructions to 0")
        return (0.25 if has_template else 0.0) if self.instructions is None else self.instructions

    def packed_shape(self, positions: int, batch_size: int, seed: int) -> PackedShape:
        """The shape of packed batches for a model of so many `positions`.

        Raises:
            ValueError: a row does not fit the model, or is no whole number of chunks, two at least.
        """
        chunk = self.chunk_length
        length = min(2048, positions) // chunk * chunk if self.sequence_length is None else self.sequence_length
        if length > positions:
            raise ValueError(f"sequence_length {length} exceeds the model's {positions} positions")
        if length % chunk or length < 2 * chunk:
            raise ValueError(
                f"a row must be two chunks or more of chunk_length {chunk}, got sequence_length {length} "
                f"(the model has {positions} positions)"
            )
        assert self.uncompressed_share is not None
        return PackedShape(length, chunk, tuple(self.span_lengths), self.uncompressed_share, batch_size, seed)


@dataclass
class AdaptationTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the defaults of an adaptation; `learning_rate` follows `trainable` if unset."""

    output_dir: str | None = field(default="runs/adapt", metadata={"help": "where the run and the adapted model go"})
    learning_rate: float | None = None  # type: ignore[assignment]
    max_steps: int = 300
    per_device_train_batch_size: int = 4
    warmup_steps: float = 20
    lr_scheduler_type: str = "cosine"
    weight_decay: float = 0.0
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "mixed precision; if unset, where the device multiplies bfloat16"}
    )
    logging_steps: float = 10
    eval_strategy: str = "steps"
    eval_steps: float | None = 100
    save_steps: float = 50
    save_total_limit: int | None = 1
    report_to: None | str | list[str] = "none"  # noqa: RUF036 (HfArgumentParser reads no other order)
    remove_unused_columns: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        # Transformers refuses bf16 on a machine without an accelerator unless it is told that this is meant.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.bf16 is None:
            device = torch.device("cpu") if self.use_cpu else torch.accelerator.current_accelerator()
            self.bf16 = not self.fp16 and device is not None and native_dtype(device) == torch.bfloat16
        super().__post_init__()
        if self.load_best_model_at_end:
            raise ValueError("load_best_model_at_end is not supported: the last model is the adapted one")
