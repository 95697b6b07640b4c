"""`compress`, `forward` and `generate` of every family: prompts, masks, plans, labels and options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from hypothesis import strategies as st
from packaging.version import Version
from torch import Tensor

from tests.fixtures.tiny import FEW, VOCAB_SIZE

from . import tensors
from .twins import ATTENTIONS, model_of, plain_of

LENGTHS = st.integers(17, 120) | st.integers(17, 300) | st.integers(1, 40)
RATIOS = st.sampled_from([1, 1.0, 1.5, 2, 2.4, 4.0, 16.0, 1e6]) | st.floats(1, 20)
# What the package adds to a call; plain Transformers gets what remains.
OWN = ("compression", "target_ratio", "span_ids", "protected_mask", "query_mask", "prefill_chunk_size")


@dataclass(frozen=True)
class Call:
    """A call, as recipes of `tensors.py`."""

    op: str
    family: str
    attention: str
    dtype: str
    ids: str
    rows: int
    width: int
    fields: dict[str, Any]
    options: dict[str, Any]
    seed: int = 0

    def model(self) -> Any:
        return model_of(self.family, self.attention, self.dtype)

    def plain(self) -> Any:
        return plain_of(self.family, self.attention, self.dtype)


@dataclass
class Arguments:
    """The tensors of a call."""

    ids: Tensor
    valid: Tensor
    given: dict[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        return {name: value for name, value in self.given.items() if name not in OWN}


IDS = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=12)
MARKERS = st.fixed_dictionaries(
    {"sentence_ends": IDS, "line_breaks": IDS, "turn_opening": IDS.map(lambda ids: ids[:2]), "turn_ending": IDS}
)


@st.composite
def fields(draw: Any) -> dict[str, Any]:
    """Compression fields that can be set on a loaded model."""
    drawn = {
        "target_ratio": draw(st.sampled_from([2.4, 1.5, 4.0, 16, 1, None])),
        "max_slots": draw(st.none() | st.none() | st.integers(1, 40)),
        "segmentation_mode": draw(st.sampled_from(["boundary", "greedy", "sentence", "uniform"])),
        "similarity_threshold": draw(st.sampled_from([None, -1.0, 0.0, 0.5, 0.9])),
        "max_span_length": draw(st.sampled_from([8, 1, 2, 3, 16, 300])),
        "num_sink_tokens": draw(st.integers(0, 6)),
        "recent_window": draw(st.integers(0, 12)),
        "min_prompt_length": draw(st.sampled_from([16, 0, 1, 2, 40])),
        "position_mode": draw(st.sampled_from(["original", "compact"])),
        "merge_mode": draw(st.sampled_from(["mean", "representative"])),
        "protected_token_ids": draw(st.none() | st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=12)),
        "text_markers": draw(st.none() | MARKERS),
        "query_weight": draw(st.sampled_from([0.0, 1.0, 16.0])),
    }
    is_greedy = drawn["segmentation_mode"] == "greedy"
    tau = drawn["similarity_threshold"]
    if drawn["max_slots"] is None and not (is_greedy and tau is not None and tau > -1):
        drawn["target_ratio"] = drawn["target_ratio"] or 2.4
    return drawn


# Before, Transformers takes an index tensor of one dimension alone.
INDICES = ["index", *["bool", "rows of index"] * (Version(transformers.__version__) >= Version("5.21"))]
LOGITS = st.tuples(st.just("last"), st.integers(0, 12)) | st.tuples(st.sampled_from(INDICES), st.integers(1, 5))
OPTIONS: dict[str, Any] = {
    "attention_mask": tensors.masks,
    "protected_mask": tensors.masks,
    "query_mask": tensors.masks,
    "read_mask": tensors.masks,
    "span_ids": st.sampled_from(tensors.PLANS),
    "target_ratio": RATIOS,
    "position_ids": st.sampled_from(["count", "gaps", "one row"]),
    "position_mode": st.sampled_from(["original", "compact"]),
    "labels": st.sampled_from(["part", "tail", "all", "none", "first"]),
    "logits_to_keep": LOGITS,
    "compression": st.booleans(),
    "prefill_chunk_size": st.sampled_from([1, 3, 7, 16, 64, 1000]),
    "use_cache": st.booleans(),
    "max_new_tokens": st.integers(1, 6),
    "num_beams": st.sampled_from([1, 2, 3]),
}
MASKING = ("attention_mask", "protected_mask", "query_mask", "span_ids", "target_ratio")
OPERATIONS = {
    "compress": (*MASKING, "read_mask", "position_ids", "position_mode"),
    "forward": (*MASKING, "position_ids", "labels", "logits_to_keep", "compression", "prefill_chunk_size", "use_cache"),
    "generate": (*MASKING, "compression", "prefill_chunk_size", "use_cache", "max_new_tokens", "num_beams"),
}


@st.composite
def calls(draw: Any, op: str) -> Call:
    width, rows = draw(LENGTHS), draw(st.sampled_from([1, 2, 1, 3, 2, 4]))
    names = draw(st.lists(st.sampled_from(OPERATIONS[op]), unique=True, max_size=4))
    if op == "forward" and draw(st.integers(0, 4)) and not {"labels", "logits_to_keep"} & set(names):
        names.append("logits_to_keep")
    if {"labels", "logits_to_keep"} <= set(names):  # they fit each other by chance alone
        names.remove("labels")
    settings = draw(fields())
    if op == "generate" and draw(st.integers(0, 5)) == 0:
        settings["recompress_every"] = max(draw(st.integers(1, 8)), settings["min_prompt_length"])
    return Call(
        op,
        draw(st.sampled_from(FEW)),
        draw(st.sampled_from(ATTENTIONS)),
        draw(st.sampled_from(["float32", "float32", "float32", "bfloat16", "float16"])),
        draw(st.sampled_from(tensors.IDS)),
        rows,
        width,
        settings,
        {name: draw(OPTIONS[name]) for name in names},
        draw(st.integers(0, 10**6)),
    )


def make_labels(kind: str, ids: Tensor, seed: int) -> Tensor:
    labels, columns = ids.clone(), torch.arange(ids.shape[1])
    if kind == "part":
        labels[torch.rand(ids.shape, generator=tensors.generator(seed, 3)) < 0.9] = -100
    elif kind == "tail":
        labels[:, : max(ids.shape[1] - 4, 0)] = -100
    elif kind == "none":
        labels[:] = -100
    elif kind == "first":
        labels[:, columns != 1] = -100
    return labels


def make_logits(recipe: tuple[str, int], rows: int, width: int, seed: int) -> Any:
    kind, number = recipe
    source = tensors.generator(seed, 4)
    if kind == "last":
        return number
    if kind == "bool":
        return torch.rand(rows, width, generator=source) < 0.2
    return torch.randint(0, width, (number,) if kind == "index" else (rows, number), generator=source)


def make_arguments(call: Call) -> Arguments:
    """Ids, what of them is no padding, and the options."""
    rows, width, seed = call.rows, call.width, call.seed
    ids = tensors.make_ids(call.ids, rows, width, seed)
    valid, given = torch.ones(rows, width, dtype=torch.bool), {}
    if "attention_mask" in call.options:
        given["attention_mask"] = tensors.make_mask(call.options["attention_mask"], rows, width, seed)
        valid = given["attention_mask"] != 0
    elif call.op == "generate" and call.ids == "special":
        # `generate` takes padding ids for padding where there is no mask.
        valid = ids != 0
    for name, recipe in call.options.items():
        if name in ("protected_mask", "query_mask", "read_mask"):
            given[name] = tensors.make_mask(recipe, rows, width, seed, salt=len(name))
        elif name == "span_ids":
            given[name] = tensors.make_plan(recipe, valid, seed)
        elif name == "labels":
            given[name] = make_labels(recipe, ids.long(), seed)
        elif name == "logits_to_keep":
            given[name] = make_logits(recipe, rows, width, seed)
        elif name == "position_ids":
            positions = (valid.long().cumsum(1) - 1).clamp(min=0)
            made = {"count": positions, "gaps": positions * 3, "one row": torch.arange(width)[None]}
            given[name] = made[recipe]
        elif name not in given:
            given[name] = recipe
    return Arguments(ids, valid, given)
