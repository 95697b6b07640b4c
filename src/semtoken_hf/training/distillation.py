"""One step of adaptation: the student reads a compressed context, the teacher the whole one; KL between the two."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..read_positions import slot_columns
from .auxiliary_tasks import ReconstructionHead, reconstruction_loss, state_matching_loss


def kl_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean KL(teacher || student) in nats per position, both [..., T, V] logits, computed in float32."""
    target = teacher.float().log_softmax(-1)
    return nn.functional.kl_div(
        student.float().log_softmax(-1).flatten(0, -2), target.flatten(0, -2), reduction="batchmean", log_target=True
    )


def kl_divergence_by_row(student: Tensor, teacher: Tensor) -> Tensor:
    """As `kl_divergence` over [B, T, V]; rows are recomputed in the backward pass, so one at a time is in float32."""
    rows = [checkpoint(kl_divergence, s, t, use_reentrant=False) for s, t in zip(student, teacher, strict=True)]
    return torch.stack(rows).mean()


class DistillationModel(nn.Module):
    """Student, teacher and auxiliary heads as the one module that `Trainer` trains.

    Args:
        student: a SemToken causal language model.
        teacher: a frozen copy of it; None where the student's uncompressed forward never changes (only the merger or
            an adapter is trained) and so is its own teacher.
        cross_entropy_weight: of the loss on the text itself, beside the KL.
        has_tasks: whether auxiliary tasks will be asked for.
    """

    def __init__(self, student: Any, teacher: Any, cross_entropy_weight: float, has_tasks: bool):
        super().__init__()
        self.student = student
        # In a tuple, so that it is neither trained, saved nor wrapped.
        self._teacher = (teacher,)
        self.cross_entropy_weight = cross_entropy_weight
        config = student.config
        self.head = ReconstructionHead(config.hidden_size, config.max_span_length) if has_tasks else None

    @property
    def teacher(self) -> Any:
        return self.student if self._teacher[0] is None else self._teacher[0]

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """For `Trainer`: of the student."""
        self.student.gradient_checkpointing_enable(**kwargs)

    def forward(
        self,
        input_ids: Tensor,
        target_length: int,
        target_ratio: float,
        compression: bool,
        task_weight: float = 0.0,
    ) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            input_ids: int64 [B, C + T].
            target_length: T, tokens scored behind the context.
            target_ratio: tokens per slot of the context.
            compression: False reads the context whole, which keeps the uncompressed model where it was.
            task_weight: of the auxiliary tasks; 0 leaves them out.

        Returns:
            `loss`, and detached `kl`, `cross_entropy` (where it counts), `reconstruction`, `state_matching`, in nats.
        """
        with_tasks = compression and task_weight > 0
        call = {"input_ids": input_ids, "logits_to_keep": target_length + 1, "use_cache": False}
        call["output_hidden_states"] = with_tasks
        with self.teaching(input_ids.device) as teacher:
            taught = teacher(**call, compression=False)
        read = self.student(**call, compression=compression, target_ratio=target_ratio)
        logits = read.logits[:, :-1]
        losses = {"kl": kl_divergence_by_row(logits, taught.logits[:, :-1])}
        loss = losses["kl"]
        if self.cross_entropy_weight:
            targets = input_ids[:, -target_length:].flatten()
            losses["cross_entropy"] = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets)
            loss = loss + self.cross_entropy_weight * losses["cross_entropy"]
        if with_tasks and (tasks := self._task_losses(read, taught, input_ids)):
            losses |= tasks
            loss = loss + task_weight * sum(tasks.values())
        return self.outcome(loss, losses)

    @contextmanager
    def teaching(self, device: torch.device) -> Iterator[Any]:
        """The teacher on `device`, without gradients, and without dropout where the student teaches itself."""
        teacher = self.teacher.to(device)
        training = teacher.training
        try:
            with torch.no_grad():
                yield teacher.eval()
        finally:
            teacher.train(training)

    def outcome(self, loss: Tensor, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """`loss` with a gradient, and `losses` without."""
        if not loss.requires_grad:  # nothing merged, and what is trained acts on merged slots alone
            loss = loss + 0.0 * sum(p.sum() for p in self.parameters() if p.requires_grad)
        return {"loss": loss, **{name: value.detach() for name, value in losses.items()}}

    def _task_losses(self, read: Any, taught: Any, input_ids: Tensor) -> dict[str, Tensor]:
        """The auxiliary losses; none where nothing merged."""
        if read.get("span_ids") is None:
            return {}
        slots, states = read.hidden_states[0], read.hidden_states[-1]
        columns = slot_columns(read.span_ids, read.compressed_lengths, slots.shape[1])
        assert self.head is not None
        vocabulary = self.student.get_output_embeddings().weight
        return {
            "reconstruction": reconstruction_loss(self.head, slots, columns, input_ids, vocabulary),
            "state_matching": state_matching_loss(states, taught.hidden_states[-1], columns),
        }
