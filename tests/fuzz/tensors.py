"""Tensors of a call from short recipes: tuples of words and numbers whose `repr` repeats them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.fixtures.tiny import VOCAB_SIZE

MASK_DTYPES = {"bool": torch.bool, "int64": torch.int64, "uint8": torch.uint8, "float32": torch.float32}
MASKS = ("ones", "left", "right", "both", "holes", "zero row", "random")
IDS = ("random", "repeated", "special", "int32")
PLANS = ("pairs", "own", "runs")

masks = st.tuples(st.sampled_from(MASKS), st.sampled_from(sorted(MASK_DTYPES)))


def generator(seed: int, salt: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * seed + salt)


def make_ids(kind: str, rows: int, width: int, seed: int) -> Tensor:
    """[rows, width] ids of a kind of `IDS`."""
    ids = torch.randint(3, VOCAB_SIZE, (rows, width), generator=generator(seed))
    if kind == "repeated":
        return ids // 100 * 100 + 3 - 3 * (ids >= 297).long()
    return {"special": ids % 7, "int32": ids.int()}.get(kind, ids)


def make_mask(recipe: tuple[str, str], rows: int, width: int, seed: int, salt: int = 1) -> Tensor:
    """[rows, width] ones and zeros of a kind of `MASKS`."""
    kind, dtype = recipe[0], MASK_DTYPES[recipe[1]]
    place, source = torch.arange(width).expand(rows, width), generator(seed, salt)
    first = torch.randint(0, max(width // 2, 1), (rows, 1), generator=source)
    last = width - torch.randint(0, max(width // 2, 1), (rows, 1), generator=source)
    mask = torch.ones(rows, width, dtype=torch.bool)
    if kind in ("left", "both"):
        mask = mask & (place >= first)
    if kind in ("right", "both"):
        mask = mask & (place < last)
    if kind in ("holes", "random"):
        mask = torch.rand(rows, width, generator=source) < (0.8 if kind == "holes" else 0.3)
    if kind == "zero row":
        mask[seed % rows] = False
    return mask.to(dtype)


def make_plan(kind: str, valid: Tensor, seed: int) -> Tensor:
    """[rows, width] slots of tokens, -1 where `valid` is False, of a kind of `PLANS`."""
    place = valid.long().cumsum(1) - 1
    if kind == "pairs":
        place = place // 2
    elif kind == "runs":
        starts = (torch.rand(valid.shape, generator=generator(seed, 5)) < 0.4) | (place == 0)
        place = (starts & valid).long().cumsum(1) - 1
    return place.where(valid, -1)
