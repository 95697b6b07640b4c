"""Auxiliary tasks of adaptation: what a slot must still tell about its span.

- Reconstruction: predict every token of a span from its slot's embedding and the token's place.
- State matching: where reading goes on after a merged span, the student's last state equals the teacher's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Tokens of a batch that are reconstructed: enough for a gradient, small beside the logits of the main task.
RECONSTRUCTED_TOKENS = 1024


class ReconstructionHead(nn.Module):
    """Predicts a span's tokens from its slot; used in training only."""

    def __init__(self, hidden_size: int, span_length: int):
        super().__init__()
        self.place = nn.Embedding(span_length, hidden_size)
        self.mix = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.norm = nn.RMSNorm(hidden_size)

    def forward(self, slots: Tensor, place: Tensor, vocabulary: Tensor) -> Tensor:
        """Logits [N, V] of the tokens at `place` (int64 [N]) in the spans of `slots` [N, H]."""
        place = place.clamp(max=self.place.num_embeddings - 1)
        query = self.norm(slots.float()) + self.place(place)
        return nn.functional.linear(self.norm(query + self.mix(query)), vocabulary)


def merged_tokens(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens share a slot, and where in their span they are.

    Args:
        columns: int64 [B, T], column of each token's slot, -1 for padding.

    Returns:
        bool [B, T] and int64 [B, T].
    """
    same = (columns[:, 1:] == columns[:, :-1]) & (columns[:, 1:] >= 0)
    joins = nn.functional.pad(same, (1, 0))
    is_merged = joins | nn.functional.pad(same, (0, 1))
    index = torch.arange(columns.shape[1], device=columns.device).expand_as(columns)
    first = index.where(~joins, 0).cummax(1).values
    return is_merged, index - first


def reconstruction_loss(
    head: nn.Module, slots: Tensor, columns: Tensor, input_ids: Tensor, vocabulary: Tensor
) -> Tensor:
    """Mean cross entropy (nats) of merged tokens given their slots.

    Args:
        head: a `ReconstructionHead`.
        slots: [B, M, H] slot embeddings.
        columns: int64 [B, T], column of each token's slot, -1 for padding.
        input_ids: int64 [B, T].
        vocabulary: [V, H] output embeddings; no gradient goes to them.
    """
    is_merged, place = merged_tokens(columns)
    row, token = is_merged.nonzero().unbind(1)
    step = -(-max(len(row), 1) // RECONSTRUCTED_TOKENS)
    # Odd steps visit every place in spans of even length.
    row, token = row[:: step | 1], token[:: step | 1]
    logits = head(slots[row, columns[row, token]], place[row, token], vocabulary.detach())
    return nn.functional.cross_entropy(logits.float(), input_ids[row, token])


def state_matching_loss(student: Tensor, teacher: Tensor, columns: Tensor) -> Tensor:
    """Squared error of the student's states at the first unmerged token behind each merged span, over their power.

    Args:
        student: [B, M, H] last states over slots.
        teacher: [B, T, H] last states over tokens.
        columns: int64 [B, T], column of each token's slot, -1 for padding.
    """
    is_merged, _ = merged_tokens(columns)
    behind = ~is_merged[:, 1:] & is_merged[:, :-1] & (columns[:, 1:] >= 0)
    row, token = nn.functional.pad(behind, (1, 0)).nonzero().unbind(1)
    target = teacher[row, token].float()
    error = student[row, columns[row, token]].float() - target
    return error.square().mean() / target.square().mean().clamp(min=1e-12)
