"""Which positions somebody reads, and where their logits come from once tokens share slots (law 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED_LABEL = -100


def read_mask_of(input_ids: Tensor, labels: Tensor | None, logits_to_keep: int | Tensor) -> Tensor | None:
    """bool [B, T]: positions whose logits are asked for; None where that is all of them.

    Args:
        input_ids: int64 [B, T].
        labels: int64 [B, T]; a label at t + 1 reads position t. With `logits_to_keep`, what is kept is read instead.
        logits_to_keep: the last k positions, an index tensor [n] or [B, n], or a bool mask [B, T]; 0 asks for all.

    Raises:
        ValueError: labels of another shape than `input_ids`, or `logits_to_keep` is none of that.
    """
    _check_logits_to_keep(logits_to_keep, tuple(input_ids.shape))
    read = torch.zeros_like(input_ids, dtype=torch.bool)
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.dtype == torch.bool:
            return logits_to_keep
        index = logits_to_keep.to(input_ids.device) % input_ids.shape[1]
        return read.scatter_(1, index.expand(len(input_ids), -1), True)
    if logits_to_keep > 0:
        if logits_to_keep >= input_ids.shape[1]:
            return None
        read[:, -logits_to_keep:] = True
        return read
    if labels is None:
        return None
    if not isinstance(labels, Tensor) or labels.shape != input_ids.shape:
        shape = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"`labels` must have the shape {tuple(input_ids.shape)} of input_ids, got {shape}")
    read[:, :-1] = labels[:, 1:] != IGNORED_LABEL
    return None if bool(read[:, :-1].all()) else read


def _check_logits_to_keep(value: Any, shape: tuple[int, ...]) -> None:
    is_tensor = isinstance(value, Tensor)
    if is_tensor and value.dtype == torch.bool:
        is_fine = value.shape == shape
    elif is_tensor:
        is_fine = value.dtype in (torch.int64, torch.int32) and (value.ndim == 1 or value.shape[:-1] == shape[:-1])
    else:
        is_fine = isinstance(value, int)
    if not is_fine:
        found = f"{value.dtype} {tuple(value.shape)}" if is_tensor else repr(value)
        raise ValueError(
            f"`logits_to_keep` must be an integer, indices [n] or [{shape[0]}, n] or a bool mask {shape}, got {found}"
        )


def slot_columns(span_ids: Tensor, compressed_lengths: Tensor, width: int) -> Tensor:
    """Column of each token's slot among the `width` columns of left-padded rows, -1 for padding: int64 [B, T].

    Args:
        span_ids: int64 [B, T], slot of every token counted from 0 in its row, -1 for padding.
        compressed_lengths: int64 [B], slots of each row.
        width: columns of the batch.
    """
    return (span_ids + (width - compressed_lengths)[:, None]).where(span_ids >= 0, -1)


def kept_states(states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The states [B, T, H] that `logits_to_keep` asks for, as the plain model picks them."""
    if isinstance(logits_to_keep, int):
        return states[:, -logits_to_keep:] if logits_to_keep else states
    if logits_to_keep.dtype == torch.bool:
        return states[logits_to_keep]
    if logits_to_keep.ndim == 2:
        return torch.take_along_dim(states, logits_to_keep[..., None], dim=1)
    return states[:, logits_to_keep]


def kept_slot_states(states: Tensor, columns: Tensor, logits_to_keep: int | Tensor) -> tuple[Tensor, Tensor]:
    """As `kept_states`, from slot states.

    Args:
        states: [B, M, H].
        columns: int64 [B, T], column of each token's slot, -1 for padding.
        logits_to_keep: over the T tokens.

    Returns:
        states [B, n, H] (or [n, H] for a bool mask) and bool [B, n], True where the position is padding.
    """
    if isinstance(logits_to_keep, Tensor):
        logits_to_keep = logits_to_keep.to(columns.device)
    wanted = kept_states(columns[..., None], logits_to_keep).squeeze(-1)
    if wanted.ndim == 1:
        assert isinstance(logits_to_keep, Tensor)
        row = logits_to_keep.nonzero()[:, 0]
        return states[row, wanted.clamp(min=0)], wanted < 0
    return torch.take_along_dim(states, wanted.clamp(min=0)[..., None], dim=1), wanted < 0


def labelled_slot_states(states: Tensor, columns: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slot states of the positions that labels score.

    Args:
        states: [B, M, H].
        columns: int64 [B, T], column of each token's slot, -1 for padding.
        labels: int64 [B, T].

    Returns:
        states [R, H]; targets int64 [R], ignored where padding would have to predict; flat index int64 [R] of the
        positions in `[B * T]`.
    """
    row, position = (labels[:, 1:] != IGNORED_LABEL).nonzero().unbind(1)
    column = columns[row, position]
    targets = labels[row, position + 1].where(column >= 0, IGNORED_LABEL)
    return states[row, column.clamp(min=0)], targets, row * labels.shape[1] + position


def fit_to_call(values: Tensor | None, name: str, start: int, tokens: int, drafted: int) -> Tensor | None:
    """Cut or extend what was given for the prompt to the tokens of one call.

    `generate` hands the same tensor to every call: to the first one, which may hold drafted tokens behind the prompt,
    and to later ones, which hold new tokens only.

    Args:
        values: `span_ids`, `protected_mask` or `query_mask` [B, n], or None.
        name: which of them.
        start: tokens that the cache holds.
        tokens: tokens of this call.
        drafted: how many of them, at the end, may be speculative.

    Returns:
        [B, tokens], or None where the values belong to tokens that the cache holds already.

    Raises:
        ValueError: the columns match neither this call nor all tokens so far.
    """
    if values is None:
        return None
    if not isinstance(values, Tensor) or values.ndim != 2:
        raise ValueError(f"`{name}` must be a tensor of shape [batch, tokens]")
    length = values.shape[1]
    if length == tokens:
        return values
    if start == 0 and length == tokens - drafted:
        behind = torch.arange(1, drafted + 1, device=values.device).expand(len(values), -1)
        return torch.cat([values, values[:, -1:] + behind if name == "span_ids" else torch.zeros_like(behind)], dim=1)
    if 0 < start < length == start + tokens:
        values = values[:, start:]
        if name == "span_ids":
            first = values.where(values >= 0, values.max()).amin(1, keepdim=True)
            values = (values - first).where(values >= 0, -1)
        return values
    if 0 < length <= start:
        return None
    raise ValueError(f"`{name}` has {length} columns, but this call has {tokens} tokens behind {start} in the cache")


__all__ = [
    "IGNORED_LABEL",
    "fit_to_call",
    "kept_slot_states",
    "kept_states",
    "labelled_slot_states",
    "read_mask_of",
    "slot_columns",
]
