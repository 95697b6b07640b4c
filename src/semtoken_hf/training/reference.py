"""A small plain Llama trained from scratch on a folder of text: the reference that a SemToken checkpoint starts from.

- Muon for the matrices inside the layers, AdamW for embeddings and norms: about half the steps of AdamW alone.
- Learning rate: warm-up, constant, then linear to zero over the last `decay_steps`. A run is resumed with another
  `steps` as long as it is still in the constant part, so training can be lengthened or closed early.
- A finished run is trained on by a new cycle: `cycle_start` set to its last step warms the rate up again.
- Short sequences in the constant part, `long_sequence_length` while the rate decays: attention over 2,048 tokens
  costs half the speed on a CPU and a rotary model learns the far positions late and quickly.
- Every row starts with BOS, as every prompt does later.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..conversion.staging import remove_stale, staged_folder
from ..evaluation.named_values import read_numbers
from .corpus import BlockSampler, iter_training_text, list_text_files, tokenize_file, weights_by_file

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


@dataclass
class ReferenceConfig:
    """What `scripts/train_reference.py` accepts; lengths and sizes in tokens."""

    text_folder: str
    output_dir: str
    vocab_size: int = 8192
    hidden_size: int = 256
    intermediate_size: int = 640
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    sequence_length: int = 512
    long_sequence_length: int = 2048
    tokens_per_step: int = 16384
    tokens_per_micro_batch: int = 4096
    steps: int = 2000
    cycle_start: int = field(
        default=0, metadata={"help": "train on after a finished run: its last step, warm up again"}
    )
    warmup_steps: int = 60
    decay_steps: int = 400
    learning_rate: float = 4e-3
    weight_decay: float = 0.1
    held_out_share: float = 0.01
    weights: list[str] = field(
        default_factory=list,
        metadata={"help": "FILE=WEIGHT, how often a file is passed over; FILE with or without suffix"},
    )
    seed: int = 0
    mixed_precision: str = "bf16"
    compile: bool = False
    checkpoint_every: int = 100
    evaluate_every: int = 100
    evaluation_blocks: int = 6

    def __post_init__(self):
        if self.tokens_per_step % self.tokens_per_micro_batch:
            raise ValueError("tokens_per_step must be a multiple of tokens_per_micro_batch")
        if self.tokens_per_micro_batch % self.long_sequence_length or self.long_sequence_length % self.sequence_length:
            raise ValueError("sequence_length must divide long_sequence_length, and that tokens_per_micro_batch")
        if self.steps - self.cycle_start < self.decay_steps + self.warmup_steps:
            raise ValueError("steps must cover cycle_start + warmup_steps + decay_steps")
        read_numbers(self.weights, "weights")

    @property
    def file_weights(self) -> dict[str, float]:
        return read_numbers(self.weights, "weights")


def train_tokenizer(files: list[Path], vocab_size: int, held_out_share: float) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the training documents: no unknown tokens, digits split one by one."""
    tokenizer = Tokenizer(models.BPE())
    pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS, EOS, PAD], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(iter_training_text(files, held_out_share), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def build_model(config: ReferenceConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A randomly initialised Llama with tied embeddings."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.long_sequence_length,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def learning_rate_factor(step: int, config: ReferenceConfig) -> float:
    """Warm-up, constant, linear decay to zero: the factor for 0-based `step`."""
    if step - config.cycle_start < config.warmup_steps:
        return (step - config.cycle_start + 1) / config.warmup_steps
    return min(1.0, (config.steps - step) / max(1, config.decay_steps))


def language_model_loss(model: nn.Module, rows: Tensor) -> Tensor:
    """Mean next-token cross entropy (nats) of `rows` int64 [B, T]."""
    return model(input_ids=rows, labels=rows, use_cache=False).loss


class ReferenceTrainer:
    """Trains, evaluates, checkpoints and resumes one reference model."""

    def __init__(self, config: ReferenceConfig):
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.accelerator = Accelerator(mixed_precision=config.mixed_precision)
        blocks, processes = config.tokens_per_step // config.long_sequence_length, self.accelerator.num_processes
        if blocks % processes:
            raise ValueError(f"{blocks} blocks a step cannot be shared by {processes} processes: raise tokens_per_step")
        set_seed(config.seed)
        files = list_text_files(config.text_folder)
        weights = weights_by_file(config.file_weights, [file.name for file in files])
        self.tokenizer = self._load_tokenizer(files)
        backend, cache = self.tokenizer.backend_tokenizer, self.output_dir / "tokens"
        bos_id = self.tokenizer.bos_token_id
        sides = {f.name: tokenize_file(f, backend, cache, config.held_out_share, bos_id) for f in files}
        length = config.long_sequence_length
        self.sampler = BlockSampler({n: s["train"] for n, s in sides.items()}, length, weights, config.seed)
        self.held_out = {n: s["held_out"] for n, s in sides.items() if len(s["held_out"]) >= length}
        self.step = 0
        model = build_model(config, self.tokenizer)
        if config.compile:
            model.model.compile()
        optimizers = self._build_optimizers(model)
        self.model, *self.optimizers = self.accelerator.prepare(model, *optimizers)
        self.accelerator.register_for_checkpointing(self)
        self._resume()

    def _load_tokenizer(self, files: list[Path]) -> PreTrainedTokenizerFast:
        folder = self.output_dir / "tokenizer"
        with self.accelerator.main_process_first():
            if not folder.exists():
                temporary = self.output_dir / "tokenizer.tmp"
                train_tokenizer(files, self.config.vocab_size, self.config.held_out_share).save_pretrained(temporary)
                temporary.rename(folder)
        return PreTrainedTokenizerFast.from_pretrained(folder)

    def _build_optimizers(self, model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
        config = self.config
        matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
        chosen = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in chosen]
        rate, decay = config.learning_rate, config.weight_decay
        return [
            torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=rate, weight_decay=0.0, betas=(0.9, 0.95)),
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "config": asdict(self.config)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        free = {"steps", "decay_steps", "cycle_start", "output_dir", "text_folder", "compile", "evaluation_blocks"}
        free |= {"warmup_steps", "checkpoint_every", "evaluate_every", "tokens_per_micro_batch"}
        now = asdict(self.config)
        changed = [k for k, v in state["config"].items() if k not in free and now[k] != v]
        if changed:
            raise ValueError(f"the checkpoint was trained with other {changed}: use its values or another output_dir")
        before = ReferenceConfig(**state["config"])
        decaying = learning_rate_factor(state["step"], before) < 1.0
        if decaying and before.steps != self.config.steps and self.config.cycle_start != state["step"]:
            raise ValueError(
                "the learning rate is already decaying: `steps` can change only before that, or with "
                f"cycle_start={state['step']} (warm up again from here)"
            )
        self.step = state["step"]

    def _resume(self) -> None:
        checkpoints = sorted(self.output_dir.glob("checkpoint-*[0-9]"), key=lambda p: int(p.name.split("-")[1]))
        if checkpoints:
            self.accelerator.load_state(str(checkpoints[-1]))
            self.accelerator.print(f"resumed from {checkpoints[-1]} at step {self.step}")

    def save_checkpoint(self) -> None:
        """Write `checkpoint-<step>` whole or not at all, then drop the older ones."""
        target = self.output_dir / f"checkpoint-{self.step:06d}"
        temporary = self.output_dir / "checkpoint.tmp"
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process and not target.exists():
            temporary.rename(target)
            for old in self.output_dir.glob("checkpoint-*[0-9]"):
                if old != target:
                    shutil.rmtree(old)

    def rows_of_step(self, step: int) -> Tensor:
        """This process's share of the rows of `step`, int64 [B, T], each opened by BOS."""
        config = self.config
        decaying = step >= config.steps - config.decay_steps
        length = config.long_sequence_length if decaying else config.sequence_length
        blocks = config.tokens_per_step // config.long_sequence_length
        mine = range(self.accelerator.process_index, blocks, self.accelerator.num_processes)
        rows = np.concatenate([self.sampler[step * blocks + i].reshape(-1, length) for i in mine])
        rows[:, 0] = self.tokenizer.bos_token_id
        return torch.from_numpy(rows).to(self.accelerator.device)

    def train_step(self) -> float:
        """One optimiser step over `tokens_per_step` tokens; returns the mean loss in nats."""
        rows = self.rows_of_step(self.step)
        batches = rows.split(max(1, self.config.tokens_per_micro_batch // rows.shape[1]))
        factor = learning_rate_factor(self.step, self.config)
        total = 0.0
        for batch in batches:
            loss = language_model_loss(self.model, batch) * (len(batch) / len(rows))
            self.accelerator.backward(loss)
            total += loss.item()
        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.config.learning_rate * factor
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return total

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Held-out loss in nats per token, per file, over `evaluation_blocks` long blocks of each."""
        self.model.eval()
        length, losses = self.config.long_sequence_length, {}
        for name, ids in self.held_out.items():
            blocks = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
            rows = np.stack(blocks[: self.config.evaluation_blocks]).astype(np.int64)
            rows[:, 0] = self.tokenizer.bos_token_id
            parts = torch.from_numpy(rows).to(self.accelerator.device).split(1)
            losses[name] = float(np.mean([language_model_loss(self.model, p).item() for p in parts]))
        self.model.train()
        return losses

    def log(self, record: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with open(self.output_dir / "log.jsonl", "a") as handle:
                handle.write(json.dumps(record) + "\n")

    def train(self) -> Path:
        """Train to `steps` and write the plain Llama folder; returns its path."""
        config, started, first = self.config, time.time(), self.step
        bar = tqdm(total=config.steps, initial=self.step, unit="step", disable=not self.accelerator.is_main_process)
        while self.step < config.steps:
            loss = self.train_step()
            speed = (self.step - first) * config.tokens_per_step / (time.time() - started)
            if not math.isfinite(loss):
                raise FloatingPointError(f"loss is {loss} at step {self.step}: lower learning_rate")
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=f"{speed:.0f}")
            record: dict[str, Any] = {
                "step": self.step,
                "tokens": self.step * config.tokens_per_step,
                "loss": loss,
                "speed": speed,
            }
            if self.step % config.evaluate_every == 0 or self.step == config.steps:
                record["held_out"] = self.evaluate()
            self.log(record)
            if self.step % config.checkpoint_every == 0 or self.step == config.steps:
                self.save_checkpoint()
        return self.save_model()

    def save_model(self) -> Path:
        """The trained model as a plain bf16 Llama folder with its tokenizer."""
        folder = self.output_dir / "model"
        model = self.accelerator.unwrap_model(self.model)
        if self.accelerator.is_main_process:
            remove_stale(folder)
            with staged_folder(folder, overwrite=True) as staged:
                self.tokenizer.save_pretrained(staged)
                model.to(torch.bfloat16).save_pretrained(staged)
        return folder
