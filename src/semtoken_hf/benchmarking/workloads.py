"""Prompts that are measured: batches of segments of a text, left-padded.

Of the package it imports nothing: the environment of the kvpress baselines, which cannot install it, loads it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# Tokens at the end of a long row that SemToken takes for a question: it is for such prompts, and they are more work.
QUESTION = 32
# Shares of the longest row.
BATCHES = {"1": (1.0,), "4": (1.0,) * 4, "skewed": (1.0, 0.125, 0.125, 0.125)}


@dataclass
class Batch:
    """Left-padded prompts.

    Attributes:
        input_ids: int64 [B, T].
        attention_mask: int64 [B, T], 0 for padding.
        lengths: tokens of each row.
    """

    input_ids: Tensor
    attention_mask: Tensor
    lengths: list[int]

    @property
    def query_mask(self) -> Tensor:
        """int64 [B, T], 1 for the question: an eighth of a short row."""
        tokens = torch.tensor([min(QUESTION, length // 8) for length in self.lengths])
        place = torch.arange(self.input_ids.shape[1])
        return (place >= place.numel() - tokens[:, None]).long().to(self.input_ids.device)

    def first_tokens(self, counts: list[int]) -> Batch:
        """The first `counts[b]` tokens of every row b."""
        starts = [self.input_ids.shape[1] - length for length in self.lengths]
        rows = [row[s : s + n] for row, s, n in zip(self.input_ids, starts, counts, strict=True)]
        return left_padded(rows)


def left_padded(rows: list[Tensor]) -> Batch:
    """Rows int64 [n_b] as a batch."""
    ids = pad_sequence(rows, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    return Batch(ids, mask, [len(row) for row in rows])


def row_lengths(name: str, length: int) -> list[int]:
    """Tokens of each row of a batch whose longest one has `length`.

    Raises:
        ValueError: the name is unknown, or a row would have no token.
    """
    if name not in BATCHES:
        raise ValueError(f"there is no batch {name!r}; there are {', '.join(BATCHES)}")
    lengths = [int(length * share) for share in BATCHES[name]]
    if min(lengths) < 1:
        raise ValueError(f"a prompt of {length} tokens leaves rows of {lengths} in the batch {name!r}: make it longer")
    return lengths


def make_batch(name: str, ids: Tensor, length: int, device: torch.device | str = "cpu") -> Batch:
    """A batch whose longest row has `length` tokens.

    Args:
        name: key of `BATCHES`.
        ids: as in `batch_of_lengths`.

    Raises:
        ValueError: as `row_lengths`.
    """
    return batch_of_lengths(ids, row_lengths(name, length), device)


def batch_of_lengths(ids: Tensor, lengths: Sequence[int], device: torch.device | str = "cpu") -> Batch:
    """A batch whose rows have so many tokens.

    Args:
        ids: int64 [n] of a text, opened by BOS; repeated where it is too short. Every row opens with its first id and
            goes on from another place of it.
        lengths: of the rows.
    """
    rows = []
    for index, tokens in enumerate(lengths):
        first = index * (len(ids) - 1) // len(lengths)
        place = (first + torch.arange(tokens - 1)) % (len(ids) - 1) + 1
        rows.append(torch.cat([ids[:1], ids[place]]).to(device))
    return left_padded(rows)


__all__ = ["BATCHES", "Batch", "batch_of_lengths", "left_padded", "make_batch", "row_lengths"]
