"""`compress`, `forward` and `generate` of every family: prompts, masks, plans, labels and options of all kinds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from hypothesis import strategies as st
from packaging.version import Version
from torch import Tensor

from tests.fixtures.tiny import FAMILIES, VOCAB_SIZE

from . import tensors
from .twins import ATTENTIONS, model_of, plain_of

LENGTHS = st.integers(17, 120) | st.integers(17, 300) | st.integers(40, 300) | st.integers(0, 40)
LONG = st.sampled_from([1000, 2048, 4096, 8191, 8192])
RATIOS = st.sampled_from([1, 1.0, 1.5, 2, 2.4, 4.0, 16.0, 1e6]) | st.floats(1, 20)
ODD_RATIOS = st.sampled_from([0.99, 0, -1, math.nan, math.inf, -math.inf, "2", True, [2], {}, 10**400, 1 + 1j])
ODD_NUMBERS = st.sampled_from([-1, 0, 1.5, "3", math.nan, [1], {}, 2**70, -(2**70)])
# What the package adds to a call; plain Transformers gets what remains.
OWN = ("compression", "target_ratio", "span_ids", "protected_mask", "query_mask", "prefill_chunk_size")


@dataclass(frozen=True)
class Call:
    """A call, as recipes of `tensors.py`; an option that is odd is listed in `odd`."""

    op: str
    family: str
    attention: str
    dtype: str
    ids: str
    rows: int
    width: int
    fields: dict[str, Any]
    options: dict[str, Any]
    odd: tuple[str, ...] = ()
    seed: int = 0

    def model(self) -> Any:
        return model_of(self.family, self.attention, self.dtype)

    def plain(self) -> Any:
        return plain_of(self.family, self.attention, self.dtype)


@dataclass
class Arguments:
    """The tensors of a call."""

    ids: Any
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
        "max_kept_tokens": draw(st.none() | st.none() | st.integers(1, 40)),
        "segmentation_mode": draw(st.sampled_from(["boundary", "greedy", "sentence", "uniform"])),
        "similarity_threshold": draw(st.sampled_from([None, -1.0, 0.0, 0.5, 0.9])),
        "max_span_length": draw(st.sampled_from([8, 1, 2, 3, 16, 300])),
        "keep_first": draw(st.integers(0, 6)),
        "keep_last": draw(st.integers(0, 12)),
        "min_prompt_length": draw(st.sampled_from([16, 0, 1, 2, 40])),
        "position_mode": draw(st.sampled_from(["original", "compact"])),
        "merge_mode": draw(st.sampled_from(["mean", "representative"])),
        "protected_token_ids": draw(st.none() | st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=12)),
        "text_markers": draw(st.none() | MARKERS),
        "query_weight": draw(st.sampled_from([0.0, 1.0, 16.0])),
    }
    is_greedy = drawn["segmentation_mode"] == "greedy"
    tau = drawn["similarity_threshold"]
    if drawn["max_kept_tokens"] is None and not (is_greedy and tau is not None and tau > -1):
        drawn["target_ratio"] = drawn["target_ratio"] or 2.4
    return drawn


# Before, Transformers takes an index tensor of one dimension alone.
INDICES = ["index", "bool"] + ["rows of index"] * (Version(transformers.__version__) >= Version("5.23"))
LOGITS = (
    st.tuples(st.just("last"), st.integers(1, 12))
    | st.tuples(st.just("last"), st.sampled_from([0, 1]))
    | st.tuples(st.sampled_from(INDICES), st.integers(1, 5))
)
ODD_LOGITS = st.tuples(
    st.just("value"), st.sampled_from([-1, -5, None, "1", 1.5, math.nan, [1], {}, 2**70, -(2**70)])
) | st.tuples(st.sampled_from(["index too large", "index float", "bool of another shape"]), st.just(1))
LABELS = st.sampled_from(["part", "tail", "all", "none", "first"])
ODD_LABELS = st.sampled_from(["short", "rows", "1D", "float", "too large", "negative", "list"])
POSITIONS = st.sampled_from(["count", "gaps", "one row"])
ODD_POSITIONS = st.sampled_from(["short", "rows", "1D", "float", "negative", "huge", "restart", "list", "still"])
ODD_FLAGS = st.sampled_from(["no", 1, 0, [], "False", 2.0])
# Valid and odd values of every option, by operation.
OPTIONS: dict[str, tuple[Any, Any]] = {
    "attention_mask": (tensors.masks, tensors.odd_masks),
    "protected_mask": (tensors.masks, tensors.odd_masks),
    "query_mask": (tensors.masks, tensors.odd_masks),
    "read_mask": (tensors.masks, tensors.odd_masks),
    "span_ids": (st.sampled_from(tensors.PLANS), st.sampled_from(tensors.ODD_PLANS)),
    "target_ratio": (RATIOS, ODD_RATIOS),
    "position_ids": (POSITIONS, ODD_POSITIONS),
    "position_mode": (st.sampled_from(["original", "compact"]), st.sampled_from(["absolute", 3, "", [], True])),
    "labels": (LABELS, ODD_LABELS),
    "logits_to_keep": (LOGITS, ODD_LOGITS),
    "compression": (st.booleans(), ODD_FLAGS),
    "prefill_chunk_size": (st.sampled_from([1, 3, 7, 16, 64, 1000]), ODD_NUMBERS),
    "use_cache": (st.booleans(), st.just("x")),
    # Not 2**70 and NaN, with which it would go on forever, as in Transformers.
    "max_new_tokens": (st.integers(1, 6), st.sampled_from([-1, 0, 1.5, "3", [1], {}, -(2**70)])),
    "num_beams": (st.sampled_from([1, 2, 3]), ODD_NUMBERS),
    "num_return_sequences": (st.just(1), ODD_NUMBERS),
    "recompress_every": (st.sampled_from([1, 4, 16]), st.nothing()),
}
MASKING = ("attention_mask", "protected_mask", "query_mask", "span_ids", "target_ratio")
OPERATIONS = {
    "compress": (*MASKING, "read_mask", "position_ids", "position_mode"),
    "forward": (
        *(*MASKING, "position_ids", "labels", "logits_to_keep", "logits_to_keep"),
        *("compression", "prefill_chunk_size", "use_cache"),
    ),
    "generate": (
        *(*MASKING, "compression", "prefill_chunk_size", "use_cache", "max_new_tokens"),
        *("num_beams", "num_return_sequences"),
    ),
}


@st.composite
def calls(draw: Any, op: str) -> Call:
    is_long = draw(st.integers(0, 199)) == 199
    width = draw(LONG) if is_long else draw(LENGTHS)
    rows = 1 if is_long else draw(st.sampled_from([1, 2, 1, 3, 2, 4, 1, 2, 1, 2, 3, 2, 0]))
    attention = draw(st.sampled_from(ATTENTIONS[1:] if width > 1000 else ATTENTIONS))
    dtype = draw(st.sampled_from(["float32", "float32", "float32", "bfloat16", "float16"]))
    names = draw(st.lists(st.sampled_from(OPERATIONS[op]), unique=True, max_size=4))
    if op == "forward" and draw(st.integers(0, 4)) and not {"labels", "logits_to_keep"} & set(names):
        names.append("logits_to_keep")
    if {"labels", "logits_to_keep"} <= set(names):  # they fit each other by chance alone
        names.remove("labels")
    # One odd thing at most, so that a refusal has to be about that.
    odd_one = draw(st.sampled_from(["ids", *names])) if draw(st.integers(0, 3)) == 3 else None
    odd = [] if odd_one is None else [odd_one]
    ids = draw(st.sampled_from(tensors.ODD_IDS if odd_one == "ids" else tensors.IDS))
    options = {name: draw(OPTIONS[name][name == odd_one]) for name in names}
    if is_long and options.get("prefill_chunk_size") in (1, 3, 7):  # thousands of forwards, which take their time
        options["prefill_chunk_size"] = 64
    settings = draw(fields())
    if op == "generate" and draw(st.integers(0, 5)) == 0:
        settings["recompress_every"] = max(draw(st.integers(1, 8)), settings["min_prompt_length"])
    family = draw(st.sampled_from(list(FAMILIES)))
    return Call(
        op, family, attention, dtype, ids, rows, width, settings, options, tuple(odd), draw(st.integers(0, 10**6))
    )


def make_labels(kind: str, ids: Tensor, seed: int) -> Any:
    labels, columns = ids.clone(), torch.arange(ids.shape[1])
    if kind == "part":
        labels[torch.rand(ids.shape, generator=tensors.generator(seed, 3)) < 0.9] = -100
    elif kind in ("tail", "too large", "negative"):
        labels[:, : max(ids.shape[1] - 4, 0)] = -100
    elif kind == "none":
        labels[:] = -100
    elif kind == "first":
        labels[:, columns != 1] = -100
    if kind in ("too large", "negative"):
        labels[:, -1:] = {"too large": VOCAB_SIZE, "negative": -7}[kind]
    return labels.float() if kind == "float" else tensors.odd_shape(kind, labels)


def make_logits(recipe: tuple[str, Any], rows: int, width: int, seed: int) -> Any:
    kind, number = recipe
    if kind in ("last", "value"):
        return number
    source = tensors.generator(seed, 4)
    index = torch.randint(0, max(width, 1), (number,), generator=source)
    made = {
        "index": lambda: index,
        "rows of index": lambda: torch.randint(0, max(width, 1), (rows, number), generator=source),
        "bool": lambda: torch.rand(rows, width, generator=source) < 0.2,
        "index too large": lambda: index + width,
        "index float": lambda: index.float(),
        "bool of another shape": lambda: torch.ones(rows, width + 1, dtype=torch.bool),
    }
    return made[kind]()


def make_positions(kind: str, valid: Tensor) -> Any:
    positions = (valid.long().cumsum(1) - 1).clamp(min=0)
    made = {
        "gaps": lambda: positions * 3,
        "one row": lambda: torch.arange(valid.shape[1])[None],
        "float": lambda: positions.float(),
        "negative": lambda: positions - 40,
        "huge": lambda: positions + 2**40,
        "restart": lambda: positions % max(valid.shape[1] // 2, 1),
        "still": lambda: positions * 0,
    }
    return made[kind]() if kind in made else tensors.odd_shape(kind, positions)


def make_arguments(call: Call) -> Arguments:
    """Ids, what of them is no padding, and the options."""
    rows, width, seed = call.rows, call.width, call.seed
    ids = tensors.make_ids(call.ids, rows, width, seed)
    whole = ids if isinstance(ids, Tensor) and ids.shape == (rows, width) else torch.zeros(rows, width)
    valid, given = torch.ones(rows, width, dtype=torch.bool), {}
    if "attention_mask" in call.options:
        given["attention_mask"] = tensors.make_mask(call.options["attention_mask"], rows, width, seed)
        mask = given["attention_mask"]
        if isinstance(mask, Tensor) and mask.shape == valid.shape:
            valid = mask != 0
    elif call.op == "generate" and call.ids == "special":
        # `generate` takes padding ids for padding where there is no mask.
        valid = ids != 0
    for name, recipe in call.options.items():
        if name in ("protected_mask", "query_mask", "read_mask"):
            given[name] = tensors.make_mask(recipe, rows, width, seed, salt=len(name))
        elif name == "span_ids":
            given[name] = tensors.make_plan(recipe, valid, seed)
        elif name == "labels":
            given[name] = make_labels(recipe, whole.long(), seed)
        elif name == "logits_to_keep":
            given[name] = make_logits(recipe, rows, width, seed)
        elif name == "position_ids":
            given[name] = make_positions(recipe, valid)
        elif name not in given:
            given[name] = recipe
    return Arguments(ids, valid, given)
