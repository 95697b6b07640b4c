"""`transformers.Trainer` for adaptation: how it evaluates, what it saves, checkpoints that are whole or not there."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import Trainer, get_scheduler

from ..evaluation.continuation import score_target
from ..evaluation.methods import METHODS
from ..evaluation.texts import window_prompt
from .adaptation_arguments import AdaptationArguments
from .adaptation_curve import write_curve
from .distillation import DistillationModel, kl_divergence
from .trainable_parts import parameter_groups

TRAINED = "trained.safetensors"
LOSS_NAMES = ("kl", "cross_entropy", "reconstruction", "state_matching")


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(
    grad: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


aten = torch.ops.aten
# PyTorch itself counts the attention kernels of GPUs only.
CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def rotate_checkpoints(folder: Path, limit: int | None) -> None:
    """Remove `folder/writing`, and all but the last `limit` checkpoints; None: keep them."""
    waste = folder / "writing"
    numbered = [p for p in folder.glob("checkpoint-*") if p.name.split("-", 1)[1].isdigit()]
    checkpoints = sorted(numbered, key=lambda p: int(p.name.split("-")[1]))
    for old in checkpoints[:-limit] if limit else []:
        # Moved first: half of it would pass for a checkpoint.
        waste.mkdir(exist_ok=True)
        old.rename(waste / f"old-{old.name}")
    shutil.rmtree(waste, ignore_errors=True)


class AdaptationTrainer(Trainer):
    """Trains a `DistillationModel`.

    Args:
        arguments: of the adaptation.
        windows: int64 [W, C + T] held-out windows.
        target_ratio: at which they are evaluated.
        targets_per_row: scored tokens of a training row.
        kwargs: of `Trainer`.
    """

    def __init__(
        self, arguments: AdaptationArguments, windows: Tensor, target_ratio: float, targets_per_row: int, **kwargs: Any
    ):
        super().__init__(**kwargs)
        self.output_dir = Path(self.args.output_dir or ".")
        self.arguments, self.schedule = arguments, arguments.schedule()
        self.windows, self.target_ratio, self.targets_per_row = windows, target_ratio, targets_per_row
        self._flops_of_step = 0
        self._components: dict[str, list[Tensor]] = {}

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        # The blocks are shuffled already, in an order that a resumed run repeats.
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        assert self.model is not None
        if self.optimizer is None:
            groups = parameter_groups(self.model, self.arguments.merger_learning_rate)
            self.optimizer = torch.optim.AdamW(
                groups,
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                weight_decay=self.args.weight_decay,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The schedule that was asked for; what is not the merger follows it in the steps behind the merger's own."""
        start = round(self.arguments.merger_only_share * num_training_steps)
        is_first = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if is_first and start and len(scheduler.base_lrs) > 1:
            if not isinstance(scheduler, LambdaLR):
                raise ValueError(f"merger_only_share must be 0 with lr_scheduler_type={self.args.lr_scheduler_type}")
            warmup = self.args.get_warmup_steps(num_training_steps)
            idle = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
            specific: Any = self.args.lr_scheduler_kwargs
            late = get_scheduler(
                self.args.lr_scheduler_type,
                idle,
                warmup,
                num_training_steps - start,
                scheduler_specific_kwargs=specific,
            ).lr_lambdas[0]
            scheduler.lr_lambdas[1] = lambda step: late(step - start) if step >= start else 0.0
            scheduler.optimizer.param_groups[1]["lr"] = 0.0
        return scheduler

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self.arguments.count_flops:
            return super().training_step(*args, **kwargs)
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            loss = super().training_step(*args, **kwargs)
        self._flops_of_step = counter.get_total_flops()
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As counted, where it is; Trainer adds it up in `state.total_flos`, through checkpoints, too."""
        return self._flops_of_step

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        progress = self.state.global_step / max(1, self.state.max_steps)
        outputs = model(**inputs, task_weight=self.schedule.weight_at(progress))
        for name in LOSS_NAMES:
            if name in outputs:
                self._components.setdefault(name, []).append(outputs[name])
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs = {**logs, **{n: torch.stack(v).mean().item() for n, v in self._components.items()}}
            self._components.clear()
        super().log(logs, *args, **kwargs)

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Context-compressed perplexity and KL on the held-out windows, beside truncation to as many slots, and what
        the uncompressed student has lost."""
        module: DistillationModel = self.accelerator.unwrap_model(self.model)
        module.eval()
        totals = dict.fromkeys(("full", "compressed", "truncated", "kl", "uncompressed"), 0.0)
        has_teacher = module.teacher is not module.student
        for window in self.windows.to(self.args.device).split(1):
            for name, value in self._score(module, window, has_teacher).items():
                totals[name] += value.item() / len(self.windows)
        rows = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        metrics = {
            "eval_perplexity": math.exp(totals["compressed"]),
            "eval_full_perplexity": math.exp(totals["full"]),
            "eval_cost": math.exp(totals["compressed"] - totals["full"]) - 1,
            "eval_truncation_cost": math.exp(totals["truncated"] - totals["full"]) - 1,
            "eval_kl": totals["kl"],
            "targets": self.state.global_step * rows * self.targets_per_row,
        }
        if has_teacher:
            metrics["eval_uncompressed_drift"] = math.exp(totals["uncompressed"] - totals["full"]) - 1
        if self.arguments.count_flops:
            self.store_flos()
            metrics["flops"] = self.state.total_flos
        self.log(metrics)
        if self.is_world_process_zero():
            write_curve(self.state.log_history, self.output_dir)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        module.train()
        return metrics

    def _score(self, module: DistillationModel, window: Tensor, has_teacher: bool) -> dict[str, Tensor]:
        """Losses in nats of one window, int64 [1, C + T]."""
        targets = window[0, -self.arguments.target_length :]
        call = {"input_ids": window, "logits_to_keep": self.arguments.target_length + 1, "use_cache": False}
        with self.accelerator.autocast():
            full = module.teacher(**call, compression=False).logits[0, :-1]
            read = module.student(**call, target_ratio=self.target_ratio).logits[0, :-1]
            scores = {"kl": kl_divergence(read, full)}
            prompt = window_prompt(0, window[0], window.shape[1] - len(targets))
            truncated = METHODS["truncation"].read(module.teacher, prompt, prompt.budget(self.target_ratio))
            scores["truncated"] = score_target(module.teacher, truncated, targets).mean()
            named = {"full": full, "compressed": read}
            if has_teacher:
                named["uncompressed"] = module.student(**call, compression=False).logits[0, :-1]
        return scores | {n: torch.nn.functional.cross_entropy(x.float(), targets) for n, x in named.items()}

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """What was trained, and nothing that the converted folder holds already."""
        folder = Path(output_dir or self.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        parameters = self.accelerator.unwrap_model(self.model).named_parameters()
        save_file({n: p.detach().cpu().contiguous() for n, p in parameters if p.requires_grad}, folder / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        state = load_file(Path(resume_from_checkpoint) / TRAINED)
        module = self.accelerator.unwrap_model(self.model if model is None else model)
        expected = {n for n, p in module.named_parameters() if p.requires_grad}
        if expected != set(state):
            raise ValueError(
                f"{resume_from_checkpoint} was written by a run that trains other parameters: use its options or "
                "another output_dir"
            )
        module.load_state_dict(state, strict=False)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Written beside its place and renamed, so that a kill never leaves half a checkpoint to resume from.
        final, self._writing = Path(self._get_output_dir(trial=trial)), True
        if self.args.should_save:
            shutil.rmtree(final / "writing", ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._writing = False
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            return
        for written in list((final / "writing").glob("checkpoint-*")):
            target = final / written.name
            if target.exists():
                target.rename(final / "writing" / "replaced")
            written.rename(target)
        rotate_checkpoints(final, self.args.save_total_limit)

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, "writing") if getattr(self, "_writing", False) else folder
