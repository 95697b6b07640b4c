"""The packed objective: one row teaches on every token of it, behind slots of what came before.

A row of n tokens is cut into C chunks. The slots of a chunk see the slots of earlier chunks and, causally, their own.
The raw tokens of a chunk see the slots of all earlier chunks and their own chunk up to themselves, nothing else. So one
forward of the family's decoder over `[slots ; raw]` gives n - n / C targets, and one plain forward their teacher. What
is scored is never inside a slot that it sees, and no encoder window reaches over the end of its chunk.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..cache_semtoken import Turn
from ..compression import compress_prompt
from .distillation import DistillationModel
from .packed_attention import chunk_views, use_packed_attention
from .sliced_divergence import sliced_divergence

# The plan comes ready: nothing else decides what merges.
FREE_FIELDS = {
    "num_sink_tokens": 0,
    "recent_window": 0,
    "min_prompt_length": 0,
    "target_ratio": None,
    "max_slots": None,
}


@dataclass
class PackedSlots:
    """Slots of every chunk but the last, row by row.

    Attributes:
        embeds: [B, M, H], those of a row first, zero behind the last.
        position_ids: int64 [B, M].
        counts: int64 [B, C - 1], slots of each chunk.
        raw_position_ids: int64 [B, n - c], positions of the raw tokens of chunks 1, 2, ..
    """

    embeds: Tensor
    position_ids: Tensor
    counts: Tensor
    raw_position_ids: Tensor


def packed_slots(student: Any, input_ids: Tensor, span_lengths: Tensor) -> PackedSlots:
    """Slots by the compression stage of inference, each chunk a prompt of its own.

    Args:
        student: a SemToken causal language model.
        input_ids: int64 [B, C * c].
        span_lengths: int64 [B, C - 1], tokens a span in each chunk, which protected tokens cut short.
    """
    base, config = student.base_model, copy.copy(student.config)
    rows, earlier = span_lengths.shape
    length = input_ids.shape[1] // (earlier + 1)
    chunks = input_ids[:, : earlier * length].reshape(-1, length)
    place = torch.arange(length, device=input_ids.device)
    first = torch.arange(earlier, device=input_ids.device).repeat(rows)[:, None] * length
    for name, value in FREE_FIELDS.items():
        setattr(config, name, value)
    prompt = compress_prompt(
        config,
        base.semantic_encoder,
        base.get_input_embeddings(),
        chunks,
        position_ids=first + place,
        merger=base.learned_merger,
        span_ids=place // span_lengths.reshape(-1, 1),
        read_mask=torch.zeros_like(chunks, dtype=torch.bool),
        protected_mask=first + place < student.config.num_sink_tokens,
    )
    counts = prompt.kept_lengths.view(rows, earlier)
    positions, raw_positions = prompt.position_ids, torch.arange(length, input_ids.shape[1], device=input_ids.device)
    raw_positions = raw_positions.expand(rows, -1)
    if config.position_mode == "compact":
        ends = counts.cumsum(1)
        positions = positions + (ends - counts).reshape(-1, 1)
        raw_positions = (ends[..., None] + place).flatten(1)
    # A row's slots lie in the last columns of its chunks: bring them together.
    is_slot = prompt.attention_mask.view(rows, -1) != 0
    order = (~is_slot).long().argsort(dim=1, stable=True)[:, : int(counts.sum(1).max())]
    embeds = prompt.inputs_embeds.view(rows, -1, prompt.inputs_embeds.shape[-1])
    embeds = embeds.gather(1, order[..., None].expand(-1, -1, embeds.shape[-1]))
    return PackedSlots(embeds, positions.view(rows, -1).gather(1, order), counts, raw_positions)


def packed_states(student: Any, input_ids: Tensor, span_lengths: Tensor) -> Tensor:
    """Last hidden states [B, n - c, H] of the raw tokens of chunks 1, 2, ..; arguments as in `packed_slots`.

    The model must use `packed_attention`. The adapter acts on the whole row.
    """
    slots, base = packed_slots(student, input_ids, span_lengths), student.base_model
    length = input_ids.shape[1] // (span_lengths.shape[1] + 1)
    raw = base.get_input_embeddings()(input_ids[:, length:])
    embeds = torch.cat([slots.embeds, raw.to(slots.embeds)], dim=1)
    positions = torch.cat([slots.position_ids, slots.raw_position_ids], dim=1)
    views = chunk_views(slots.counts, length)
    mask = embeds.new_zeros((1, 1, 1, 1))  # of four dimensions: Transformers makes none; the views say what is seen
    turn = Turn("inputs_embeds", embeds, positions, None, mask, adapted=True)
    outputs = base._run(turn, 0, False, None, packed_views=views)
    return outputs.last_hidden_state[:, slots.embeds.shape[1] :]


@torch.no_grad()
def check_linear_head(student: Any) -> None:
    """Raise ValueError unless logits are output embeddings times last states, which slices of them count on."""
    ids = torch.arange(min(8, student.config.vocab_size), device=student.device)[None]
    states = student.base_model(ids, compression=False, use_cache=False).last_hidden_state
    expected = student.get_output_embeddings()(states)
    if not torch.allclose(student(ids, compression=False).logits, expected, rtol=1e-2, atol=1e-3):
        raise ValueError(
            f"the head of {student.config.model_type} scales or caps its logits, which the packed objective cannot "
            "slice: use objective='window'"
        )


class PackedDistillationModel(DistillationModel):
    """As `DistillationModel`, by the packed objective."""

    def __init__(self, student: Any, teacher: Any, cross_entropy_weight: float):
        super().__init__(student, teacher, cross_entropy_weight, has_tasks=False)
        check_linear_head(student)
        use_packed_attention(student)

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, span_lengths: Tensor, compression: bool = True, task_weight: float = 0.0
    ) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            input_ids: int64 [B, C * c].
            span_lengths: int64 [B, C - 1], tokens a span in each chunk but the last.
            compression: False reads the row whole, which keeps the uncompressed model where it was.
            task_weight: unused; there are no auxiliary tasks.

        Returns:
            `loss`, and detached `kl` and `cross_entropy` (where it counts), means over the n - c targets in nats.
        """
        length = input_ids.shape[1] // (span_lengths.shape[1] + 1)
        with self.teaching(input_ids.device) as teacher:
            taught = teacher.base_model(input_ids, compression=False, use_cache=False).last_hidden_state[:, length:]
        if compression:
            read = packed_states(self.student, input_ids, span_lengths)
        else:
            read = self.student.base_model(input_ids, compression=False, use_cache=False).last_hidden_state[:, length:]
        heads = self.student.get_output_embeddings().weight, self.teacher.get_output_embeddings().weight
        losses = {"kl": sliced_divergence(read.flatten(0, 1), heads[0], taught.flatten(0, 1), heads[1])}
        loss = losses["kl"]
        if self.cross_entropy_weight:
            losses["cross_entropy"] = self._cross_entropy(read[:, :-1], input_ids[:, length + 1 :])
            loss = loss + self.cross_entropy_weight * losses["cross_entropy"]
        return self.outcome(loss, losses)

    def _cross_entropy(self, states: Tensor, targets: Tensor) -> Tensor:
        logits = self.student.get_output_embeddings()(states)
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
