"""A cache that is continued, cropped, reordered, repeated, selected and reset, in any order."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from semtoken_hf import SemTokenCache
from tests.fixtures.tiny import FEW

from . import tensors
from .calls import fields
from .judging import Family, require
from .twins import ATTENTIONS, configured, model_of

STEPS = {
    "turn": st.integers(1, 40) | st.integers(1, 3),
    "masked turn": st.integers(2, 40),
    "plain turn": st.integers(1, 20),
    "crop": st.integers(0, 12) | st.sampled_from([10**6, 2**70]),
    "reorder": st.integers(0, 10**4),
    "repeat": st.sampled_from([1, 2, 3]),
    "select": st.integers(0, 10**4),
    "reset": st.just(0),
    "copy": st.just(0),
}


@dataclass(frozen=True)
class Case:
    family: str
    attention: str
    rows: int
    width: int
    mask: tuple[str, str]
    fields: dict[str, Any]
    steps: tuple[tuple[str, int], ...]
    seed: int


@st.composite
def cases(draw: Any) -> Case:
    names = draw(st.lists(st.sampled_from(list(STEPS)), min_size=1, max_size=6))
    masks = [("ones", "int64"), ("left", "int64"), ("both", "bool"), ("holes", "int64"), ("zero row", "int64")]
    return Case(
        draw(st.sampled_from(FEW)),
        draw(st.sampled_from(ATTENTIONS)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 90)),
        draw(st.sampled_from(masks)),
        draw(fields()),
        tuple((name, draw(STEPS[name])) for name in names),
        draw(st.integers(0, 10**6)),
    )


class Walk:
    """A cache, and what it should say of itself: the mask over all tokens so far."""

    def __init__(self, case: Case, model: Any):
        self.case, self.model, self.cache = case, model, SemTokenCache(config=model.config)
        self.valid = torch.zeros(case.rows, 0, dtype=torch.long)
        self.count = 0
        self.has_lost_padding = case.mask[0] in ("both", "holes")

    def read(self, width: int, mask: Tensor | None = None, compression: bool = True) -> Tensor:
        """Append a turn; returns its last logits."""
        self.count += 1
        ids = tensors.make_ids("random", len(self.valid), width, self.case.seed + self.count)
        self.valid = torch.cat([self.valid, torch.ones_like(ids) if mask is None else mask.long()], 1)
        return self.model(
            ids,
            attention_mask=self.valid,
            past_key_values=self.cache,
            logits_to_keep=1,
            compression=compression,
        ).logits[:, -1]

    def check(self) -> None:
        cache, tokens = self.cache, self.valid.shape[1]
        require(cache.get_seq_length() == tokens, f"get_seq_length is {cache.get_seq_length()} after {tokens} tokens")
        if cache.slot_lengths is None:
            require(tokens == 0, "nothing is recorded")
            return
        require(len(cache.slot_lengths) == len(self.valid), "the record has other rows")
        require(cache.original_lengths.tolist() == self.valid.sum(1).tolist(), "original_lengths is wrong")
        require(bool((cache.compressed_lengths <= cache.original_lengths).all()), "more slots than tokens")
        require((cache.memory_bytes() > 0) == (tokens > 0), "no bytes")
        if cache.ragged_rows is None:
            held = {tuple(layer.keys.shape[::2]) for layer in cache.layers}
            require(held == {tuple(cache.slot_lengths.shape)}, f"layers hold {held}")

    def crop(self, count: int) -> str:
        cache, tail = self.cache, self.cache.slot_lengths
        if cache.is_compressed and count > cache.plain_tail and self.has_lost_padding:
            return "what is behind padding has no columns of its own"
        whole = tail is not None and count <= tail.shape[1] and not bool((tail[:, tail.shape[1] - count :] > 1).any())
        try:
            cache.crop(-count)
        except ValueError as error:
            require("crop" in str(error) and not whole and tail is not None, f"refused to crop: {error}")
            return "refused"
        require(whole or tail is None, "cropped into a merged slot")
        if tail is not None and count:
            self.valid = self.valid[:, : self.valid.shape[1] - count]
        return "cropped"

    def step(self, name: str, number: int) -> None:
        rows = len(self.valid)
        if name in ("turn", "plain turn"):
            logits = self.read(number, compression=name == "turn")
            require(bool(logits.isfinite().all()), "logits of the last token are not finite")
        elif name == "masked turn":
            mask = tensors.make_mask(("left", "int64"), rows, number, self.case.seed + self.count, 9)
            logits = self.read(number, mask)
            require(bool(logits.isfinite().all()), "logits of the last token are not finite")
        elif name == "crop":
            self.crop(number)
        elif name == "copy":
            self.cache = copy.deepcopy(self.cache)
        elif name == "reset":
            self.cache.reset()
            self.valid = self.valid[:, :0]
        elif name in ("reorder", "select") and self.valid.shape[1]:
            source = tensors.generator(number)
            count = rows if name == "reorder" else 1 + number % rows
            index = torch.randint(0, rows, (count,), generator=source)
            self.cache.reorder_cache(index) if name == "reorder" else self.cache.batch_select_indices(index)
            self.valid = self.valid[index]
        elif name == "repeat" and self.valid.shape[1] and rows * number <= 12:
            self.cache.batch_repeat_interleave(number)
            self.valid = self.valid.repeat_interleave(number, 0)


def run(case: Case) -> str:
    model = model_of(case.family, case.attention, "float32")
    with configured(model, case.fields), torch.no_grad():
        walk = Walk(case, model)
        walk.read(case.width, tensors.make_mask(case.mask, case.rows, case.width, case.seed))
        walk.check()
        for name, number in case.steps:
            walk.step(name, number)
            walk.check()
    return "merged" if walk.cache.is_compressed else "nothing merged"


CACHES = Family(cases(), run, weight=1.5)
