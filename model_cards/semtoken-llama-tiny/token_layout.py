"""Which tokens are planned together: rows of a batch as one packed stream of independent segments.

- Padding goes to the end of the stream and is cut off, so a plan cannot depend on it (law 4).
- A segment ends with a position that is read; a scored token that is not read itself is a segment of its own. So no
  segment holds anything that an earlier logit is scored on (law 3).
- How many tokens and segments there are, only the device knows: tensors have the size of the batch until `trim` is
  told the numbers, so that nothing here waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass
class TokenLayout:
    """A batch of token ids as one stream of N tokens in S segments.

    Attributes:
        token_index: int64 [N], index of each token in the flattened `[B * T]` batch.
        row: int64 [N], batch row of each token.
        position: int64 [N], 0-based place of each token among the tokens of its row.
        segment: int64 [N], segment of each token, counted over the whole stream.
        starts: int64 [S], first token of each segment in the stream.
        lengths: int64 [S], tokens of each segment.
        unmergeable: bool [N], tokens that keep a slot of their own.

    Before `trim`, padding follows the last token and empty segments the last segment.
    """

    token_index: Tensor
    row: Tensor
    position: Tensor
    segment: Tensor
    starts: Tensor
    lengths: Tensor
    unmergeable: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TokenLayout:
        """The layout on another device; `accelerate` calls it where a model is spread over several."""
        return TokenLayout(*(getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)))

    def trim(self, tokens: int, segments: int) -> TokenLayout:
        """The layout without padding and empty segments, given how many others there are."""
        sizes = {"starts": segments, "lengths": segments}
        return TokenLayout(*(getattr(self, f.name)[: sizes.get(f.name, tokens)] for f in fields(self)))

    @property
    def is_token(self) -> Tensor:
        """bool [N]: False for padding."""
        return torch.arange(len(self.row), device=self.row.device) < self.lengths.sum()

    @property
    def to_end(self) -> Tensor:
        """int64 [N]: tokens between each token and the end of its segment."""
        return distance_to_end(self.segment, self.starts, self.lengths)

    def segment_at(self, index: Tensor) -> Tensor:
        """Segment of the tokens `index` [n]: int64 [n]; behind the last token, that of the last."""
        return self.segment[index.clamp(max=len(self.segment) - 1)]

    @property
    def mergeable(self) -> Tensor:
        """bool [N]: True where a token may share a slot with the token before it."""
        free = ~self.unmergeable
        mergeable = torch.zeros_like(free)
        mergeable[1:] = free[1:] & free[:-1] & (self.segment[1:] == self.segment[:-1])
        return mergeable


def build_layout(
    valid: Tensor,
    read: Tensor,
    protected: Tensor,
    num_sink_tokens: int,
    recent_window: int,
    min_length: int,
) -> TokenLayout:
    """Pack a batch into segments and mark what stays whole.

    Args:
        valid: bool [B, T], False for padding.
        read: bool [B, T], positions whose logits somebody asked for.
        protected: bool [B, T], tokens that must not merge for any other reason.
        num_sink_tokens: tokens at the start of every row that stay whole.
        recent_window: tokens at the end of every segment that stay whole.
        min_length: segments shorter than this stay whole.
    """
    flat, columns = valid.flatten(), valid.shape[1]
    place = torch.arange(flat.numel(), device=flat.device)
    order = flat.long().cumsum(0)
    tokens = order[-1:] if len(order) else flat.new_zeros(1, dtype=torch.long)
    # Tokens in their order, then padding in its own.
    token_index = torch.empty_like(place).scatter_(0, (order - 1).where(flat, tokens + place - order), place)
    is_token = place < tokens
    row = token_index // max(columns, 1)
    position = (valid.long().cumsum(1) - 1).flatten()[token_index]
    is_read = read.flatten()[token_index] & is_token

    first_of_row = (position == 0) & is_token
    scored = _shifted(is_read) & ~first_of_row & is_token
    opens = first_of_row | scored | (_shifted(scored) & is_token)

    # Padding is one more segment, which `starts` and `lengths` do not have.
    segment = (opens | (place == tokens)).long().cumsum(0) - 1
    starts = indices_where(opens, len(opens)).minimum(tokens)
    lengths = torch.cat([starts, tokens]).diff()

    to_end = distance_to_end(segment, starts, lengths)
    unmergeable = is_read | scored | protected.flatten()[token_index] | ~is_token
    unmergeable |= (position < num_sink_tokens) | (to_end < recent_window) | (lengths[segment] < min_length)
    return TokenLayout(token_index, row, position, segment, starts, lengths, unmergeable)


def _shifted(flags: Tensor) -> Tensor:
    """`flags` [N] one place later."""
    shifted = torch.zeros_like(flags)
    shifted[1:] = flags[:-1]
    return shifted


def indices_where(flags: Tensor, size: int) -> Tensor:
    """The first `size` indices at which `flags` (bool [N]) is True, then N: int64 [size].

    `nonzero` of a known size: nothing waits for the device.
    """
    index = torch.full((size + 1,), flags.numel(), device=flags.device)
    place = torch.arange(flags.numel(), device=flags.device)
    # What has no place of its own shares the last one, which is cut off.
    return index.scatter_(0, (flags.long().cumsum(0) - 1).where(flags, size).clamp(max=size), place)[:size]


def distance_to_end(index: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """int64 [N]: tokens between each token and the end of its part, for parts `index` [N] of a stream."""
    return (starts + lengths - 1)[index] - torch.arange(len(index), device=index.device)


def on_device(numbers: Any, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Numbers of the host, without waiting for the device."""
    is_pinned = device.type == "cuda" and torch.cuda.is_available()
    return torch.tensor(numbers, dtype=dtype, pin_memory=is_pinned).to(device, non_blocking=True)


__all__ = ["TokenLayout", "build_layout", "distance_to_end", "indices_where", "on_device"]
