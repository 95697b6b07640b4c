"""What a correct plan of a prompt is, said a second time in plain loops over rows and tokens."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .judging import Wrong, require


@dataclass
class Asked:
    """A call of the compression stage, as tensors.

    Attributes:
        config: the configuration that the call was made under.
        ids: int64 [B, T].
        valid: bool [B, T].
        read: bool [B, T], or None for the last token of each row.
        protected: bool [B, T], marked by the caller, or None.
        query: bool [B, T], tokens of the question, or None.
        ratio: of the call, or None.
        is_planned: whether `span_ids` came from outside.
        is_sequence_start: False behind a cache that is not empty.
    """

    config: Any
    ids: Tensor
    valid: Tensor
    read: Tensor | None = None
    protected: Tensor | None = None
    query: Tensor | None = None
    ratio: float | None = None
    is_planned: bool = False
    is_sequence_start: bool = True


def always_whole(config: Any) -> set[int]:
    ids = set(config.protected_token_ids or [])
    for value in (config.bos_token_id, config.eos_token_id, config.pad_token_id):
        ids |= set(value) if isinstance(value, (list, tuple)) else set() if value is None else {value}
    return ids


def segments(read: list[bool]) -> list[tuple[int, int]]:
    """First token and end of each segment of a row: a token that an earlier logit is scored on begins one."""
    cuts = {0, len(read)}
    for place, is_read in enumerate(read):
        if is_read and place + 1 < len(read):
            cuts |= {place + 1, min(place + 2, len(read))}
    places = sorted(cuts)
    return list(itertools.pairwise(places))


def budget_of(length: int, config: Any, ratio: float | None) -> int:
    if length < config.min_prompt_length:
        return length
    budget = length if ratio is None else math.ceil(length / ratio - 1e-9)
    if config.max_slots is not None:
        budget = min(budget, config.max_slots)
    return min(max(budget, 1), length)


def check_row(asked: Asked, row: int, spans: list[int], kept: int, budget_met: bool) -> list[int]:
    """Check the plan of one row; returns the lengths of its slots."""
    config = asked.config
    where = asked.valid[row].nonzero().flatten().tolist()
    tokens = [asked.ids[row, t].item() for t in where]
    read = [i == len(where) - 1 if asked.read is None else bool(asked.read[row, t]) for i, t in enumerate(where)]
    require(all(s == -1 for t, s in enumerate(spans) if t not in set(where)), "span_ids is not -1 at padding")
    mine = [spans[t] for t in where]
    steps = [b - a for a, b in itertools.pairwise([-1, *mine])]
    require(all(s in (0, 1) for s in steps) and (not steps or steps[0] == 1), "span_ids does not count 0, 1, 2, ...")
    require(kept == (mine[-1] + 1 if mine else 0), "kept_lengths differs from span_ids")
    lengths = [0] * kept
    for span in mine:
        lengths[span] += 1
    whole, budget, first = always_whole(config), 0, config.num_sink_tokens if asked.is_sequence_start else 0
    ratio = config.target_ratio if asked.ratio is None else asked.ratio
    for low, high in segments(read) if where else []:
        budget += budget_of(high - low, config, ratio)
        for place in range(low, high):
            must = (
                read[place] or (place and read[place - 1]) or place < first or high - 1 - place < config.recent_window
                or high - low < config.min_prompt_length or tokens[place] in whole
                or (asked.protected is not None and bool(asked.protected[row, where[place]]))
                or (asked.query is not None and bool(asked.query[row, where[place]]))
            )  # fmt: skip
            require(not must or lengths[mine[place]] == 1, f"token {place} of row {row} must stay whole")
        if low:
            require(mine[low] != mine[low - 1], "a slot holds tokens of two segments")
    require(budget_met == (kept <= budget), f"budget_met is {budget_met}, but {kept} slots stand against {budget}")
    if not asked.is_planned:
        require(max(lengths, default=0) <= config.max_span_length, "a slot is longer than max_span_length")
    return lengths


def check_prompt(asked: Asked, prompt: Any, embeddings: Any) -> None:
    """Raise `Wrong` unless `prompt` (a CompressedPrompt) is a correct answer."""
    rows, kept = len(asked.ids), prompt.kept_lengths.tolist()
    width = prompt.inputs_embeds.shape[1]
    require(prompt.span_ids.shape == asked.ids.shape, "span_ids has another shape than input_ids")
    require(prompt.slot_counts == kept and width == max(kept, default=0), "slot_counts differs from kept_lengths")
    require(prompt.original_lengths.tolist() == asked.valid.sum(1).tolist(), "original_lengths are not the tokens")
    require(bool(prompt.inputs_embeds.isfinite().all()), "a slot's embedding is not finite")
    table = embeddings(asked.ids.where(asked.valid, 0)).detach()
    for row in range(rows):
        spans = prompt.span_ids[row].tolist()
        lengths = check_row(asked, row, spans, kept[row], bool(prompt.budget_met[row]))
        padding = width - kept[row]
        require(prompt.slot_lengths[row].tolist() == [0] * padding + lengths, "slot_lengths differs from span_ids")
        require(prompt.attention_mask[row].tolist() == [0] * padding + [1] * kept[row], "attention_mask is wrong")
        require(not prompt.inputs_embeds[row, :padding].any(), "padding is not zero")
        alone = [(t, padding + s) for t, s in enumerate(spans) if s >= 0 and lengths[s] == 1]
        if alone:
            places, columns = map(list, zip(*alone, strict=True))
            same = torch.equal(prompt.inputs_embeds[row, columns], table[row, places])
            require(same, "a token that is alone in its slot has another embedding")
    merged = any(n < m for n, m in zip(kept, prompt.original_lengths.tolist(), strict=True))
    require(prompt.is_merged == merged, "is_merged is wrong")
    require(prompt.is_padded == (min(kept, default=0) < width), "is_padded is wrong")


def check_positions(prompt: Any, mode: str, offset: Tensor | None = None) -> None:
    """Positions grow along each row; compact ones count the slots, original ones end with the last token."""
    for row, kept in enumerate(prompt.kept_lengths.tolist()):
        positions = prompt.position_ids[row, prompt.position_ids.shape[1] - kept :]
        base = 0 if offset is None else int(offset[row])
        require(bool((positions.diff() > 0).all()), "positions do not grow")
        if mode == "compact":
            require(positions.tolist() == list(range(base, base + kept)), "compact positions do not count the slots")
        elif kept:
            last = base + int(prompt.original_lengths[row]) - 1
            require(int(positions[-1]) <= last and int(positions[0]) >= base, "a position is not of the row")


def check_close(ours: Tensor, theirs: Tensor, what: str, tolerance: float = 2e-4) -> None:
    """Equal up to rounding, NaN in the same places."""
    try:
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance, equal_nan=True)
    except AssertionError as error:
        raise Wrong(f"{what}: {error}") from None


def check_same(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Bit for bit, NaN in the same places."""
    same = ours.shape == theirs.shape and ours.dtype == theirs.dtype
    require(same and torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0)), f"{what}: not bit for bit the same")
    require(torch.equal(ours.isnan(), theirs.isnan()), f"{what}: NaN elsewhere")
