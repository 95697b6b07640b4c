"""`semtoken adapt`: teach a converted checkpoint to read merged slots as it reads the tokens themselves.

The teacher is the same checkpoint without compression. Three amounts of training:

- `merger`: the learned merger alone; the uncompressed model stays bit-identical.
- `lora`: merger and a PEFT adapter that acts on compressed rows alone; likewise bit-identical.
- `full`: everything but the encoder; a quarter of the steps keep the uncompressed model where it was.

Two objectives: `packed_objective.py` scores every token of a row, `distillation.py` those behind a context.
"""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.trainer_utils import get_last_checkpoint

from ..conversion.encoder import quiet_loading
from ..conversion.source import check_semtoken
from ..conversion.staging import check_output, remove_stale, staged_folder
from ..evaluation.files import only_run_in, write_text
from ..evaluation.named_values import read_fields
from .adaptation_arguments import LEARNING_RATES, AdaptationArguments, AdaptationTrainingArguments
from .adaptation_data import (
    EXPORTED,
    ContextCollator,
    PackedCollator,
    TextBlocks,
    begin_id,
    export_dataset,
    load_blocks,
)
from .adaptation_trainer import AdaptationTrainer, rotate_checkpoints
from .corpus import list_text_files, weights_by_file
from .distillation import DistillationModel
from .instruction_data import InstructionBlocks
from .packed_objective import PackedDistillationModel
from .trainable_parts import check_installed, choose_trainable, leave_casts_to_autocast


def load_student(arguments: AdaptationArguments) -> Any:
    """The checkpoint with a learned merger, zero where it had none.

    Raises:
        ValueError: the checkpoint is a plain one, or carries an adapter already.
    """
    fields = {"merge_mode": "learned", **read_fields(arguments.set_fields, "set_fields")}
    if fields["merge_mode"] != "learned":
        raise ValueError("adaptation trains the learned merger: leave merge_mode out of set_fields, or set merger_base")
    config = AutoConfig.from_pretrained(arguments.checkpoint)
    check_semtoken(config, arguments.checkpoint)
    if config.adapter_subfolder is not None:
        raise ValueError(f"{arguments.checkpoint} carries an adapter already: adapt the folder it came from")
    if unknown := [name for name in fields if not hasattr(config, name)]:
        raise ValueError(f"the configuration has no fields {unknown}")
    dtype = getattr(torch, arguments.model_dtype)
    if config.merge_mode != "learned":
        # The residual is added to what the checkpoint merges by now.
        fields.setdefault("merger_base", config.merge_mode)
    if arguments.objective == "packed":
        # No slot holds more tokens than those that it learns to read.
        fields.setdefault("max_span_length", min(config.max_span_length, max(arguments.span_lengths)))
    with quiet_loading(config.merge_mode != "learned"):  # that the merger is new is no news
        return AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=dtype, **fields)


def build_trainer(arguments: AdaptationArguments, training: AdaptationTrainingArguments) -> AdaptationTrainer:
    """Everything that a run needs, seeded.

    Raises:
        FileNotFoundError: the text folder holds no text.
        ValueError: lengths do not fit the model or the text, or a weight stands for no file.
        ImportError: PEFT or `datasets` is needed and missing.
    """
    check_installed(arguments.trainable)
    set_seed(training.seed)
    weights = weights_by_file(arguments.file_weights(), _text_files(arguments))
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    student = load_student(arguments)
    window = _context_length(arguments, student.config) + arguments.target_length
    teacher = copy.deepcopy(student).requires_grad_(False).eval() if arguments.trainable == "full" else None
    choose_trainable(student, arguments.trainable, arguments.lora_rank, arguments.lora_alpha)
    if arguments.trainable == "lora" and (training.bf16 or training.fp16):
        leave_casts_to_autocast(student)
    module, collate, row, targets = build_objective(arguments, training, student, teacher)
    output_dir = Path(training.output_dir or "runs/adapt")
    folder, share = _text_folder(arguments, output_dir), arguments.held_out_share
    cache = output_dir / "tokens"
    sampler, held_out = load_blocks(folder, tokenizer, cache, row, weights, share, training.seed, window)
    training.learning_rate = training.learning_rate or LEARNING_RATES[arguments.trainable]
    rows = training.max_steps * training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    data: Dataset = (blocks := TextBlocks(sampler, begin_id(tokenizer), rows))
    if isinstance(collate, PackedCollator):
        data = InstructionBlocks(blocks, tokenizer, collate.shape, arguments.instruction_share(tokenizer))
    return AdaptationTrainer(
        arguments,
        held_out[: arguments.evaluation_windows],
        target_ratio=student.config.target_ratio or 2.4,
        targets_per_row=targets,
        model=module,
        args=training,
        train_dataset=data,
        eval_dataset=[],
        data_collator=collate,
        processing_class=tokenizer,
    )


def build_objective(
    arguments: AdaptationArguments, training: AdaptationTrainingArguments, student: Any, teacher: Any
) -> tuple[DistillationModel, PackedCollator | ContextCollator, int, int]:
    """The module, the collator, the tokens of a block and the targets among them; `teacher` as in the module.

    Raises:
        ValueError: lengths do not fit the model.
    """
    rows, config, weight = training.per_device_train_batch_size, student.config, arguments.cross_entropy_weight
    if arguments.objective == "packed":
        packed = arguments.packed_shape(config.max_position_embeddings, rows, training.seed)
        module = PackedDistillationModel(student, teacher, weight)
        return module, PackedCollator(packed), packed.sequence_length, packed.targets
    context, targets = _context_length(arguments, config), arguments.target_length
    window = ContextCollator(arguments.batch_shape(context, rows, training.seed))
    return DistillationModel(student, teacher, weight, arguments.tasks != "none"), window, context + targets, targets


def _text_files(arguments: AdaptationArguments) -> list[str]:
    """Names of the files with the text, before a data set is exported to its one."""
    is_folder = Path(arguments.text).is_dir()
    return [file.name for file in list_text_files(arguments.text)] if is_folder else [EXPORTED]


def _text_folder(arguments: AdaptationArguments, output_dir: Path) -> Path:
    """The folder with the text, exported from its data set where it is none."""
    if Path(arguments.text).is_dir():
        return Path(arguments.text)
    named = arguments.text, arguments.text_config, arguments.text_split, arguments.text_column
    return export_dataset(*named, output_dir / "data", arguments.text_documents)


def _context_length(arguments: AdaptationArguments, config: Any) -> int:
    """The longest context: what was asked for, or what fits the trained positions, at most 1,792 tokens."""
    room = config.max_position_embeddings - arguments.target_length
    context = min(room, 1792) if arguments.context_length is None else arguments.context_length
    if context > room:
        raise ValueError(
            f"context_length {context} + target_length {arguments.target_length} exceed the model's "
            f"{config.max_position_embeddings} positions"
        )
    if context < config.min_prompt_length:
        raise ValueError(
            f"a context of {context} tokens is below the checkpoint's min_prompt_length {config.min_prompt_length} and "
            "would never be compressed: lower the one or raise the other"
        )
    return context


def save_adapted(trainer: AdaptationTrainer, arguments: AdaptationArguments) -> Path:
    """The adapted checkpoint as a folder of its own, in the dtype of the original; written whole or not at all."""
    student = trainer.accelerator.unwrap_model(trainer.model).student
    dtype = AutoConfig.from_pretrained(arguments.checkpoint).dtype or torch.float32
    if student.dtype not in (torch.float32, dtype):
        student = _on_exact_base(student, arguments)
    config = student.config
    config.adapted_for = {
        "position_mode": config.position_mode,
        "segmentation_mode": config.segmentation_mode,
        "trainable": arguments.trainable,
        "objective": arguments.objective,
        **arguments.trained_lengths(),
        "steps": trainer.state.global_step,
    }
    output_dir, tokenizer = trainer.output_dir, trainer.processing_class
    assert tokenizer is not None
    target = output_dir / "model"
    student.to(dtype)
    with staged_folder(target, overwrite=True) as staged:
        tokenizer.save_pretrained(staged)
        # Last, and the weights are its last: without them nobody takes what a kill leaves for a checkpoint.
        student.save_pretrained(staged)
    return target


def _on_exact_base(student: Any, arguments: AdaptationArguments) -> Any:
    """What was trained, on the base as it was before `model_dtype` rounded it."""
    trained = {name: p.data for name, p in student.named_parameters() if p.requires_grad}
    exact = load_student(replace(arguments, model_dtype="float32"))
    choose_trainable(exact, arguments.trainable, arguments.lora_rank, arguments.lora_alpha)
    exact.load_state_dict(trained, strict=False)
    return exact


def adapt(arguments: AdaptationArguments, training: AdaptationTrainingArguments) -> Path:
    """Run an adaptation, resuming where the last one in `output_dir` was killed; returns the adapted folder.

    Raises:
        FileNotFoundError, ValueError, ImportError: as `build_trainer`.
        ValueError: `output_dir` holds a run with other options, or another process is adapting there.
        FileExistsError: `output_dir/model` is no checkpoint.
    """
    if not training.should_save:  # another process of the same run holds the folder
        return _adapt(arguments, training)
    output_dir = Path(training.output_dir or "runs/adapt")
    with only_run_in(output_dir, "adaptation"):
        remove_stale(output_dir / "model")
        check_output(output_dir / "model", True, [])
        # A killed run may not have come to it.
        rotate_checkpoints(output_dir, training.save_total_limit)
        try:
            return _adapt(arguments, training)
        finally:  # nothing half-written stays, whatever ends the run
            shutil.rmtree(output_dir / "writing", ignore_errors=True)


def _adapt(arguments: AdaptationArguments, training: AdaptationTrainingArguments) -> Path:
    trainer = build_trainer(arguments, training)
    output_dir = trainer.output_dir
    _check_same_run(output_dir, arguments, training)
    last = get_last_checkpoint(output_dir) if output_dir.is_dir() else None
    training.eval_on_start = last is None and training.eval_strategy != "no"
    trainer.train(resume_from_checkpoint=last)
    if trainer.is_world_process_zero():
        folder = save_adapted(trainer, arguments)
    trainer.accelerator.wait_for_everyone()
    return folder if trainer.is_world_process_zero() else output_dir / "model"


def _check_same_run(output_dir: Path, arguments: AdaptationArguments, training: AdaptationTrainingArguments) -> None:
    """Write down what the run is, or refuse to go on with another one."""
    record = output_dir / "adaptation.json"
    now = {
        **asdict(arguments),
        "max_steps": training.max_steps,
        "batch": training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": str(training.lr_scheduler_type),
        "warmup_steps": training.warmup_steps,
        "seed": training.seed,
        # Not where they lie, which may change.
        "text": Path(arguments.text).name,
        "checkpoint": Path(arguments.checkpoint).name,
    }
    for name in ("evaluation_windows", "count_flops"):
        now.pop(name)
    if record.exists():
        before = json.loads(record.read_text(encoding="utf-8"))
        if changed := sorted(k for k in now if before.get(k) != now[k]):
            raise ValueError(f"{output_dir} holds a run with other {changed}: use its options or another output_dir")
    elif training.should_save:
        write_text(record, json.dumps(now, indent=1) + "\n")
