"""The axes of the matrix of laws, said once: families x attention x position mode x merge mode x road.

A model, its plain twin and what a road comes to are made once for each case; no test may change them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fixtures.tiny import FAMILIES, plain_twin, tiny_model

from .roads import ROADS, Outcome

CLOSE = {"atol": 2e-5, "rtol": 1e-5}
WINDOW = 16
# Families, and variants that forget old slots: a window on every layer, and on the second layer alone.
SLIDING: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral sliding": ("mistral", {"sliding_window": WINDOW}),
    "qwen3 sliding": ("qwen3", {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
}
FAMILY_FIELDS: dict[str, tuple[str, dict[str, Any]]] = {**{name: (name, {}) for name in FAMILIES}, **SLIDING}
# The last one holds each row's slots alone; the windows of SLIDING it pads, as `sdpa` does.
PADDED, VARLEN = ("eager", "sdpa"), "semtoken_varlen"
ATTENTIONS = (*PADDED, VARLEN)
POSITIONS = ("original", "compact")
MERGES: dict[str, dict[str, Any]] = {
    "mean": {},
    "representative": {"merge_mode": "representative"},
    "learned": {"merge_mode": "learned", "merger_base": "mean", "merger_rank": 8},
}
RATIO = 2.4


@dataclass(frozen=True)
class Case:
    """A model of the matrix."""

    family: str
    attention: str = "sdpa"
    positions: str = "original"
    merge: str = "mean"
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return "-".join(str(value).replace("torch.", "") for value in astuple(self) if value != torch.float32)

    @property
    def is_sliding(self) -> bool:
        return self.family in SLIDING

    @property
    def is_ragged(self) -> bool:
        return self.attention == VARLEN and not self.is_sliding


def every_case() -> list[Case]:
    """The full product; how slots were merged cannot matter to what a window forgets, nor to how rows lie."""
    full = itertools.product(FAMILIES, PADDED, POSITIONS, MERGES)
    spread = [case for case in spread_cases() if case.attention == VARLEN]
    return [Case(*axes) for axes in [*full, *itertools.product(SLIDING, PADDED, POSITIONS, ["mean"])]] + spread


def spread_cases() -> list[Case]:
    """Families x attention x positions, the merge modes spread over them: for what only sees finished slots."""
    merges = itertools.cycle(MERGES)
    windows = [Case(*axes) for axes in itertools.product(SLIDING, PADDED, POSITIONS)]
    cases = [Case(*axes, merge=next(merges)) for axes in itertools.product(FAMILIES, PADDED, POSITIONS)]
    ragged = [Case(*axes, merge=next(merges)) for axes in itertools.product(FAMILIES, [VARLEN], POSITIONS)]
    return cases + windows + ragged


def cells(roads: Iterable[str], attentions: Iterable[str]) -> list[Any]:
    """`pytest.param(case, road)`: every case where merging is at stake, the spread ones where decoding is."""
    return [
        pytest.param(case, name, id=f"{case}-{name}")
        for name in roads
        for case in (spread_cases() if ROADS[name].is_decoding else every_case())
        if case.attention in attentions
    ]


def each_case(cases: Iterable[Case]) -> Any:
    return pytest.mark.parametrize("case", list(cases), ids=str)


def each_cell(roads: Iterable[str], attentions: Iterable[str] = ATTENTIONS) -> Any:
    return pytest.mark.parametrize(("case", "road"), cells(roads, attentions))


@functools.cache
def weights_of(family: str) -> dict[str, Tensor]:
    """One set of weights for a family and its variants, a merger that is not its base included."""
    model = tiny_model(family=family, **MERGES["learned"])
    merger = model.base_model.learned_merger
    torch.nn.init.normal_(merger.out_proj, std=0.3, generator=torch.Generator().manual_seed(1))
    torch.nn.init.normal_(merger.length_vectors, std=0.5, generator=torch.Generator().manual_seed(2))
    return model.state_dict()


def build(case: Case, **fields: Any) -> Any:
    """A new model, for tests that change it."""
    family, variant = FAMILY_FIELDS[case.family]
    given = {"attn_implementation": case.attention, "position_mode": case.positions, "target_ratio": RATIO}
    model = tiny_model(family=family, **{**given, **MERGES[case.merge], **variant, **fields})
    mine = model.state_dict().keys()
    model.load_state_dict({name: value for name, value in weights_of(family).items() if name in mine})
    return model.to(case.dtype)


@functools.cache
def model_of(case: Case) -> Any:
    return build(case)


@functools.cache
def plain_of(case: Case) -> Any:
    """The plain twin, one for all modes; that of SDPA where rows of different lengths would have to be exactly it."""
    modes = Case(case.family, "sdpa" if case.attention == VARLEN else case.attention, dtype=case.dtype)
    return plain_twin(model_of(case)) if case == modes else plain_of(modes)


@functools.cache
def outcome_of(case: Case, road: str) -> Outcome:
    """What the compressed model comes to on the road's batch."""
    return ROADS[road].run(model_of(case), *ROADS[road].batch())


@functools.cache
def plain_outcome(case: Case, road: str) -> Outcome:
    """What the plain twin comes to on the same batch."""
    case = replace(case, positions="original", merge="mean")
    return ROADS[road].run(plain_of(case), *ROADS[road].batch())


def assert_identical(ours: Outcome, theirs: Outcome) -> None:
    """Bit for bit, by name; parts that only the model under test has are left out."""
    mine, others = ours.tensors(), theirs.tensors()
    assert others.keys() <= mine.keys()
    assert {name for name in mine if "merger" not in name} <= others.keys()
    for name, value in others.items():
        assert mine[name].dtype == value.dtype, name
        assert is_equal(mine[name], value), name


def is_equal(ours: Tensor, theirs: Tensor) -> bool:
    """Where both are NaN, too."""
    if torch.equal(ours, theirs):
        return True
    return torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.nan_to_num(), theirs.nan_to_num())
