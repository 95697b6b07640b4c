"""Configurations: any value in any field, the dictionary there and back, a tiny model, a prompt compressed."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from semtoken_hf.configuration_semtoken import SemTokenConfigMixin
from tests.fixtures.tiny import BERT, FAMILIES, VOCAB_SIZE, random_ids, tiny_config

from . import hostile
from .judging import Family, require
from .oracle import Asked, check_positions, check_prompt

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
HEADS = {"qwen3": {"head_dim": 8}}
FIELDS = [field.name for field in dataclasses.fields(SemTokenConfigMixin)]


def _integer(low: int, high: int = sys.maxsize, optional: bool = False) -> Callable[[Any], bool]:
    return lambda v: (optional and v is None) or (type(v) is int and low <= v <= high)


def _number(low: float, high: float, optional: bool = False) -> Callable[[Any], bool]:
    return lambda v: (optional and v is None) or (type(v) in (int, float) and low <= v <= high)


def _choice(*values: str) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, str) and v in values


def _is_folder(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.replace("_", "").replace("-", "").isalnum())


def _is_encoder(value: Any) -> bool:
    return value is None or value in ENCODERS


ENCODERS: list[Any] = [
    {"model_type": "semtoken_static"},
    {"model_type": "semtoken_static", "hidden_size": 3},
    {"model_type": "bert", **BERT},
    {"model_type": "roberta", **{k: v for k, v in BERT.items() if k != "model_type"}, "pad_token_id": 1},
]
HOSTILE_ENCODERS: list[Any] = [
    {"model_type": "bert", **BERT, name: value}
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "hidden_act")
    for value in (None, -1, 0, "x", 1.5, 2**40, [1], {"a": {}})
    # Layers of such sizes would really be made here, as those of the decoder are in plain Transformers.
    if (name, value) != ("hidden_size", 2**40) and (name, value) != ("max_position_embeddings", 2**40)
]
MARKERS = ["sentence_ends", "line_breaks", "turn_opening", "turn_ending"]
IDS = st.lists(st.integers(0, VOCAB_SIZE + 5), max_size=20)


def _is_ids(value: Any) -> bool:
    is_list = isinstance(value, (list, tuple))
    return value is None or (is_list and all(type(i) is int and 0 <= i < 2**63 for i in value))


# Valid values of every field, said again, and where to look for them.
SPECIFICATION: dict[str, tuple[Callable[[Any], bool], st.SearchStrategy[Any]]] = {
    "compression": (lambda v: isinstance(v, bool), st.booleans()),
    "target_ratio": (_number(1, sys.float_info.max, True), st.none() | st.floats(1, 64) | st.integers(1, 16)),
    "max_kept_tokens": (_integer(1, optional=True), st.none() | st.integers(1, 300)),
    "similarity_threshold": (_number(-1, 1, True), st.none() | st.floats(-1, 1)),
    "entropy_threshold": (_number(0, 1, True), st.none() | st.floats(0, 1)),
    "query_weight": (_number(0, 16), st.floats(0, 16)),
    "max_span_length": (_integer(1, 1024), st.integers(1, 40)),
    "keep_first": (_integer(0), st.integers(0, 20)),
    "keep_last": (_integer(0), st.integers(0, 40)),
    "min_prompt_length": (_integer(0), st.integers(0, 100)),
    "recompress_every": (_integer(1, optional=True), st.none() | st.integers(1, 300)),
    "position_mode": (_choice("original", "compact"), st.sampled_from(["original", "compact"])),
    "segmentation_mode": (
        _choice("greedy", "sentence", "boundary", "uniform"),
        st.sampled_from(["greedy", "sentence", "boundary", "uniform"]),
    ),
    "merge_mode": (
        _choice("mean", "representative", "learned"),
        st.sampled_from(["mean", "representative", "learned"]),
    ),
    "merger_base": (_choice("mean", "representative"), st.sampled_from(["mean", "representative"])),
    "merger_rank": (_integer(1, 8192), st.integers(1, 32)),
    "adapter_subfolder": (_is_folder, st.sampled_from([None, "adapter", "a-b_1"])),
    "adapted_for": (
        lambda v: v is None or isinstance(v, dict),
        st.sampled_from([None, {}, {"position_mode": "compact"}]),
    ),
    "encoder_config": (_is_encoder, st.sampled_from([None, *ENCODERS])),
    "encoder_dtype": (_choice("auto", "float32", "bfloat16"), st.sampled_from(["auto", "float32", "bfloat16"])),
    "encoder_window": (_integer(1, 8192), st.integers(1, 60)),
    "encoder_overlap": (_integer(0, 8191), st.integers(0, 20)),
    "fingerprint_radius": (_integer(0, 256), st.integers(0, 12)),
    "protected_token_ids": (_is_ids, st.none() | IDS),
    "text_markers": (
        lambda v: v is None or (isinstance(v, dict) and v.keys() <= set(MARKERS) and all(map(_is_ids, v.values()))),
        st.none() | st.dictionaries(st.sampled_from(MARKERS), st.none() | IDS),
    ),
}
HOSTILE: dict[str, st.SearchStrategy[Any]] = {
    "encoder_config": st.sampled_from(HOSTILE_ENCODERS) | hostile.anything,
    "protected_token_ids": st.lists(hostile.integers, max_size=3) | hostile.anything,
    "text_markers": st.dictionaries(st.sampled_from([*MARKERS, "x"]), hostile.anything, max_size=3) | hostile.anything,
}
LIMITS = {
    "target_ratio": (1, sys.float_info.max),
    "similarity_threshold": (-1, 1),
    "entropy_threshold": (0, 1),
    "query_weight": (0, 16),
    "max_span_length": (1, 1024),
    "encoder_window": (1, 8192),
    "fingerprint_radius": (0, 256),
    "merger_rank": (1, 8192),
}
NUMERIC = {
    name for name in FIELDS if not name.endswith(("mode", "config", "dtype", "base", "ids", "for", "folder", "markers"))
}


@dataclass(frozen=True)
class Case:
    family: str
    fields: dict[str, Any]
    length: int
    rows: int = 1
    seed: int = 0


@st.composite
def cases(draw: Any) -> Case:
    fields = {}
    for name in draw(st.lists(st.sampled_from(FIELDS), unique=True, max_size=8)):
        boundary = hostile.integers | hostile.floats if name in NUMERIC else hostile.texts
        low, high = LIMITS.get(name, (0, sys.maxsize))
        edges = st.sampled_from([low, high, low - 1, high + 1, low - 0.01, high + 0.01])
        odd = HOSTILE.get(name, hostile.anything) | (edges | boundary if name in NUMERIC else boundary)
        is_odd = draw(st.integers(0, 9)) == 0
        fields[name] = draw(odd if is_odd else SPECIFICATION[name][1])
    length = draw(st.integers(0, 200) | st.integers(0, 40) | st.sampled_from([256, 1000]))
    return Case(
        draw(st.sampled_from(list(FAMILIES))), fields, length, draw(st.integers(1, 2)), draw(st.integers(0, 99))
    )


def _values(case: Case) -> dict[str, Any]:
    defaults = {field.name: field.default for field in dataclasses.fields(SemTokenConfigMixin)}
    base = {k: v for k, v in tiny_config().to_dict().items() if k in defaults and k != "encoder_config"}
    return {**base, "encoder_config": None, "encoder_window": 32, **case.fields}


def invalid(case: Case) -> tuple[str, ...]:
    """Fields that a refusal may name: those out of their range, else those that do not fit together."""
    values = _values(case)
    bad = [name for name, value in case.fields.items() if not SPECIFICATION[name][0](value)]
    if bad:
        # A field may also be refused in terms of another that has to fit it.
        return tuple({*bad, *(("encoder_window", "model_type") if "encoder_config" in bad else ())})
    bad = []
    encoder = values["encoder_config"] or {}
    longest = {"bert": 64, "roberta": 62}.get(encoder.get("model_type"), math.inf)
    if values["encoder_overlap"] >= values["encoder_window"]:
        bad.append("encoder_overlap")
    if values["encoder_window"] > longest:
        bad.append("encoder_window")
    every, tau = values["recompress_every"], values["similarity_threshold"]
    if every is not None and every + values["keep_last"] < values["min_prompt_length"]:
        bad.append("recompress_every")
    by_threshold = values["segmentation_mode"] == "greedy" and tau is not None and tau > -1
    if values["target_ratio"] is None and values["max_kept_tokens"] is None and not by_threshold:
        bad.append("target_ratio")
    return tuple(bad)


def run(case: Case) -> str:
    config = tiny_config(case.family, **{**SMALL, **HEADS.get(case.family, {}), "encoder_window": 32, **case.fields})
    # Of an odd encoder, its own configuration decides.
    require(not set(invalid(case)) - {"encoder_config", "encoder_window", "model_type"}, f"accepted {invalid(case)}")
    for name, value in case.fields.items():
        if name != "encoder_config":
            require(getattr(config, name) == value, f"`{name}` was changed")
    written = config.to_dict()
    again = [type(config).from_dict(written), CONFIG_MAPPING[config.model_type](**written)]
    again.append(type(config).from_dict(json.loads(config.to_json_string())))
    require(all(other.to_dict() == written for other in again), "the dictionary there and back is another")
    torch.manual_seed(case.seed)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    ids = random_ids(case.rows, case.length, case.seed) if case.length else torch.zeros(case.rows, 0, dtype=torch.long)
    with torch.no_grad():
        prompt = model.compress(ids)
    check_prompt(Asked(config, ids, torch.ones_like(ids, dtype=torch.bool)), prompt, model.get_input_embeddings())
    check_positions(prompt, config.position_mode)
    return "merged" if prompt.is_merged else "nothing to merge"


CONFIGURATIONS = Family(cases(), run, invalid, weight=2)
