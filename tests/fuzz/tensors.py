"""Tensors of a call from short recipes: tuples of words and numbers whose `repr` repeats them."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.fixtures.tiny import VOCAB_SIZE

MASK_DTYPES = {
    "bool": torch.bool,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
}
# What a mask may look like, and what no call may pass.
MASKS = ("ones", "left", "right", "both", "holes", "zero row", "random")
ODD_MASKS = ("short", "long", "rows", "1D", "3D", "fractions", "nan", "list", "text", "all zero")
IDS = ("random", "repeated", "special", "int32")
ODD_IDS = ("too large", "negative", "huge", "float", "bool", "int8", "1D", "3D", "list")
PLANS = ("pairs", "own", "runs")
ODD_PLANS = ("short", "rows", "1D", "float", "bool", "gap", "from one", "backwards", "huge", "negative", "list", "nan")

masks = st.tuples(st.sampled_from(MASKS), st.sampled_from(sorted(MASK_DTYPES)))
odd_masks = st.tuples(st.sampled_from(ODD_MASKS), st.sampled_from(sorted(MASK_DTYPES)))


def generator(seed: int, salt: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * seed + salt)


def make_ids(kind: str, rows: int, width: int, seed: int) -> Any:
    """[rows, width] ids of a kind of `IDS` or `ODD_IDS`."""
    ids = torch.randint(3, VOCAB_SIZE, (rows, width), generator=generator(seed))
    if kind == "repeated":
        ids = ids // 100 * 100 + 3 - 3 * (ids >= 297).long()
    elif kind == "special":
        ids = ids % 7
    elif kind in ("too large", "negative", "huge") and ids.numel():
        # In front, where it may merge: `keep_last` would let every call read it.
        ids[-1, width // 2] = {"too large": VOCAB_SIZE, "negative": -3, "huge": 2**62}[kind]
    changes = {
        "int32": lambda: ids.int(),
        "float": lambda: ids.float(),
        "bool": lambda: ids > 100,
        "int8": lambda: (ids % 100).to(torch.int8),
        "1D": lambda: ids.flatten(),
        "3D": lambda: ids[None],
        "list": lambda: ids.tolist(),
    }
    return changes.get(kind, lambda: ids)()


def make_mask(recipe: tuple[str, str], rows: int, width: int, seed: int, salt: int = 1) -> Any:
    """[rows, width] ones and zeros of a kind of `MASKS` or `ODD_MASKS`."""
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
    if kind == "zero row" and rows:
        mask[seed % rows] = False
    if kind == "all zero":
        mask = ~mask
    found = mask.to(dtype)
    return odd_shape(kind, found) if kind in ODD_MASKS else found


def odd_shape(kind: str, values: Tensor) -> Any:
    changes = {
        "short": lambda: values[:, :-1],
        "long": lambda: torch.cat([values, values[:, -1:], values[:, -1:]], 1),
        "rows": lambda: torch.cat([values, values[-1:]]),
        "1D": lambda: values.flatten(),
        "3D": lambda: values[None],
        "fractions": lambda: values.float() * 0.5,
        "nan": lambda: values.float() * torch.nan,
        "list": lambda: values.tolist(),
        "text": lambda: "a mask",
    }
    return changes.get(kind, lambda: values)()


def make_plan(kind: str, valid: Tensor, seed: int) -> Any:
    """[rows, width] slots of tokens, -1 where `valid` is False, of a kind of `PLANS` or `ODD_PLANS`."""
    place = valid.long().cumsum(1) - 1
    if kind == "pairs":
        plan = place // 2
    elif kind == "runs":
        starts = (torch.rand(valid.shape, generator=generator(seed, 5)) < 0.4) | (place == 0)
        plan = (starts & valid).long().cumsum(1) - 1
    else:
        plan = place
    plan = plan.where(valid, -1)
    changes = {
        "float": lambda: plan.float(),
        "bool": lambda: plan > 3,
        "gap": lambda: plan.where(plan < 2, plan + 1),
        "from one": lambda: plan.where(plan < 0, plan + 1),
        "backwards": lambda: plan.flip(1),
        "huge": lambda: plan.where(plan < 1, 2**62),
        "negative": lambda: plan - 2,
        "nan": lambda: plan.float() * torch.nan,
    }
    return changes[kind]() if kind in changes else odd_shape(kind, plan)
