"""Which tokens are planned together: rows of a batch as one packed stream of independent stretches.

- Padding is left out of the stream, so a plan cannot depend on it (law 4).
- A stretch ends with a position that is read; a scored token that is not read itself is a stretch of its own. So no
  stretch holds anything that an earlier logit is scored on (law 3).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class TokenLayout:
    """A batch of token ids as one stream of N tokens in S stretches.

    Attributes:
        token_index: int64 [N], index of each token in the flattened `[B * T]` batch.
        row: int64 [N], batch row of each token.
        position: int64 [N], 0-based place of each token among the tokens of its row.
        stretch: int64 [N], stretch of each token, counted over the whole stream.
        starts: int64 [S], first token of each stretch in the stream.
        lengths: int64 [S], tokens of each stretch.
        solo: bool [N], tokens that keep a slot of their own.
    """

    token_index: Tensor
    row: Tensor
    position: Tensor
    stretch: Tensor
    starts: Tensor
    lengths: Tensor
    solo: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TokenLayout:
        """The layout on another device; `accelerate` calls it where a model is spread over several."""
        return TokenLayout(*(getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)))

    @property
    def to_end(self) -> Tensor:
        """int64 [N]: tokens between each token and the end of its stretch."""
        return distance_to_end(self.stretch, self.starts, self.lengths)

    @property
    def joinable(self) -> Tensor:
        """bool [N]: True where a token may share a slot with the token before it."""
        free = ~self.solo
        joinable = free.clone()
        joinable[1:] &= free[:-1]
        joinable[self.starts] = False
        return joinable


def build_layout(
    valid: Tensor,
    read: Tensor,
    protected: Tensor,
    keep_first: int,
    keep_last: int,
    min_length: int,
) -> TokenLayout:
    """Pack a batch into stretches and mark what stays whole.

    Args:
        valid: bool [B, T], False for padding.
        read: bool [B, T], positions whose logits somebody asked for.
        protected: bool [B, T], tokens that must not merge for any other reason.
        keep_first: tokens at the start of every row that stay whole.
        keep_last: tokens at the end of every stretch that stay whole.
        min_length: stretches shorter than this stay whole.
    """
    columns = valid.shape[1]
    token_index = valid.flatten().nonzero().squeeze(1)
    row = token_index // columns
    position = (valid.long().cumsum(1) - 1).flatten()[token_index]
    is_read = read.flatten()[token_index]

    first_of_row = position == 0
    after_read = torch.zeros_like(is_read)
    after_read[1:] = is_read[:-1]
    scored = after_read & ~first_of_row
    after_scored = torch.zeros_like(scored)
    after_scored[1:] = scored[:-1]
    opens = first_of_row | scored | after_scored

    stretch = opens.long().cumsum(0) - 1
    starts = opens.nonzero().squeeze(1)
    total = torch.full_like(starts[:1], token_index.numel())
    lengths = torch.cat([starts, total]).diff()

    to_end = distance_to_end(stretch, starts, lengths)
    solo = is_read | scored | protected.flatten()[token_index]
    solo |= (position < keep_first) | (to_end < keep_last) | (lengths[stretch] < min_length)
    return TokenLayout(token_index, row, position, stretch, starts, lengths, solo)


def distance_to_end(index: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """int64 [N]: tokens between each token and the end of its part, for parts `index` [N] of a stream."""
    return (starts + lengths - 1)[index] - torch.arange(len(index), device=index.device)


__all__ = ["TokenLayout", "build_layout", "distance_to_end"]
