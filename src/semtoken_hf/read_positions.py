"""Which positions somebody reads, and where their logits come from once tokens share slots (law 2).

Others put a forward of their own on a model, as the fused heads of trainers do, and it calls the base model by itself:
the base model then learns what the call reads from `head_reads`, which that forward hands on with the arguments that
it does not know (`telling_base`).
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED_LABEL = -100
# Arguments of a head that say which positions are read.
READING = ("labels", "shift_labels", "logits_to_keep")


def read_mask_of(
    input_ids: Tensor, labels: Tensor | None, logits_to_keep: int | Tensor, attention_mask: Tensor | None = None
) -> Tensor | None:
    """bool [B, T]: positions whose logits are asked for; None where that is all of them.

    Args:
        input_ids: int64 [B, T].
        labels: int64 [B, T]; a label at t + 1 reads position t. With `logits_to_keep`, what is kept is read instead.
        logits_to_keep: the last k positions, an index tensor [n] or [B, n], or a bool mask [B, T]; 0 asks for all.
        attention_mask: [B, T], or longer by what the cache holds; 0 for padding, which labels need not score.

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
    return read if _leaves_neighbours(read, attention_mask) else None


def _leaves_neighbours(read: Tensor, attention_mask: Tensor | None) -> bool:
    """Whether two neighbours that predict a token are not read, without which nothing merges. One alone is the EOS that
    a collator takes for padding, or the BOS."""
    unread, tokens = ~read[:, :-1], read.shape[1]
    if attention_mask is not None and attention_mask.shape[1] >= tokens:
        real = (attention_mask[:, -tokens:] != 0).to(read.device)
        unread = unread & real[:, :-1] & real[:, 1:]
    return bool((unread[:, 1:] & unread[:, :-1]).any())


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
    """Column of each token's slot among the last `width` columns of left-padded rows, -1 for padding: int64 [B, T].

    Args:
        span_ids: int64 [B, T], slot of every token counted from 0 in its row, -1 for padding.
        compressed_lengths: int64 [B], slots of each row.
        width: columns of the batch.
    """
    return (span_ids + (width - compressed_lengths)[:, None]).where(span_ids >= 0, -1)


def token_states(states: Tensor, prompt: Any, read: Tensor) -> Tensor:
    """Slot states [B, M, H] of a CompressedPrompt as states of its tokens [B, T, H], zero where `read` [B, T] is False.

    A state that nobody reads is zero, not NaN, which would poison the gradient of whoever multiplies it by zero.
    """
    columns = slot_columns(prompt.span_ids, prompt.kept_lengths, states.shape[1])
    return _take_columns(states, columns.where(read.to(columns.device), -1))


def _take_columns(states: Tensor, columns: Tensor) -> Tensor:
    """Of [B, M, H] the columns [B, n]: [B, n, H], zero where a column is negative."""
    columns = columns.to(states.device)
    taken = torch.take_along_dim(states, columns.clamp(min=0)[..., None], dim=1)
    return taken.masked_fill((columns < 0)[..., None], 0)


@dataclass
class KeptPositions:
    """What a head reads of a merged prompt by `logits_to_keep`.

    Attributes:
        prompt: the CompressedPrompt.
        logits_to_keep: over its tokens.
    """

    prompt: Any
    logits_to_keep: int | Tensor

    @property
    def last_columns(self) -> int:
        """Columns at the end of the slots that are read: those read have slots of their own, at the end as in the row.
        0: any."""
        return self.logits_to_keep if isinstance(self.logits_to_keep, int) else 0

    def states(self, states: Tensor) -> Tensor:
        """Slot states [B, M, H], or the last columns of them, as states of tokens for the head.

        Returns:
            [B, last_columns, H] or [B, T, H]; zero at padding, whose logits were asked for and stay finite.
        """
        columns = slot_columns(self.prompt.span_ids, self.prompt.kept_lengths, states.shape[1])
        return _take_columns(states, columns[:, -self.last_columns :] if self.last_columns else columns)


class LabelledPositions:
    """What a head reads of a merged prompt by its labels: the R positions that a label scores.

    Args:
        prompt: the CompressedPrompt.
        labels: int64 [B, T].

    Attributes:
        targets: int64 [1, R], the labels behind those positions, ignored where padding would have to predict.
    """

    last_columns = 0

    def __init__(self, prompt: Any, labels: Tensor):
        self.prompt, self.shape = prompt, labels.shape
        self.row, self.position = (labels[:, 1:] != IGNORED_LABEL).nonzero().to(prompt.span_ids.device).unbind(1)
        self.is_padding = prompt.span_ids[self.row, self.position] < 0
        targets = labels[self.row.to(labels.device), self.position.to(labels.device) + 1]
        self.targets = targets.masked_fill(self.is_padding.to(labels.device), IGNORED_LABEL)[None]

    def states(self, states: Tensor) -> Tensor:
        """Slot states [B, M, H] of those positions, [1, R, H]."""
        columns = slot_columns(self.prompt.span_ids, self.prompt.kept_lengths, states.shape[1])
        column = columns[self.row, self.position].clamp(min=0)
        return states[self.row.to(states.device), column.to(states.device)][None]

    def lay_out(self, logits: Tensor) -> Tensor:
        """The head's logits [1, R, V] as [B, T, V], NaN where no label scores or padding would have to predict."""
        scored = logits[0].masked_fill(self.is_padding[:, None].to(logits.device), torch.nan)
        laid_out = logits.new_full((self.shape.numel(), logits.shape[-1]), torch.nan)
        # In place: a second tensor of this size is what training has no room for.
        index = (self.row * self.shape[1] + self.position).to(logits.device)
        return laid_out.index_copy_(0, index, scored).unflatten(0, tuple(self.shape))


def align_to_step(values: Tensor | None, name: str, start: int, tokens: int, drafted: int) -> Tensor | None:
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


def reads_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """What a call says of the positions that are read; empty where it says nothing of them."""
    return {name: arguments[name] for name in READING if name in arguments}


def telling_base(model: Any, forward: Any) -> Any:
    """`forward` with `head_reads` among its arguments; unchanged if it is the model's own, or takes no others."""
    function = forward.__func__ if getattr(forward, "__self__", None) is model else None
    if function is type(model).forward or not _takes_any_argument(forward):
        return forward

    @functools.wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs["head_reads"] = reads_of(kwargs) or {"labels": None}
        # A copy of the model runs its own.
        return forward(*args, **kwargs) if function is None else function(self, *args, **kwargs)

    return types.MethodType(run, model)


def _takes_any_argument(function: Callable[..., Any]) -> bool:
    try:
        # What it is called with, not what it says to stand for.
        parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


__all__ = [
    "IGNORED_LABEL",
    "KeptPositions",
    "LabelledPositions",
    "READING",
    "align_to_step",
    "read_mask_of",
    "reads_of",
    "slot_columns",
    "telling_base",
    "token_states",
]
