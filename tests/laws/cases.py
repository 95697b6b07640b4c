"""The axes of the matrix of laws, said once: families x attention x position mode x merge mode x code path.

The shipped default on Llama meets every attention, position mode and code path; the other families, merge modes and
windows are spread over them pairwise. A model, its plain twin and what a code path comes to are made once for each
case; no test may change them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from typing import Any

import pytest
import torch
import transformers
from packaging import version
from torch import Tensor
from transformers import modeling_utils

from tests.fixtures.tiny import FAMILIES, WITH_WINDOWS, plain_twin, tiny_model

from .code_paths import CODE_PATHS, Outcome

NEWEST = version.parse("5.23")
CLOSE = {"atol": 2e-5, "rtol": 1e-5}
WINDOW = 16
# Families, and variants that forget old slots: a window on every layer, and on the second layer alone.
SLIDING: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral sliding": ("mistral", {"sliding_window": WINDOW}),
    "qwen3 sliding": ("qwen3", {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
}
FAMILY_FIELDS: dict[str, tuple[str, dict[str, Any]]] = {**{name: (name, {}) for name in FAMILIES}, **SLIDING}
OTHERS = [name for name in FAMILY_FIELDS if name != "llama"]
VARLEN = "semtoken_varlen"
# The last one holds each row's slots alone; windows it pads, as `sdpa` does.
ATTENTIONS = ("eager", "sdpa", VARLEN)
POSITIONS = ("original", "compact")
# The modes that a checkpoint is converted with; some ids end a sentence.
SHIPPED = {
    "segmentation_mode": "sentence",
    "merge_mode": "representative",
    "max_span_length": 256,
    "text_markers": {"sentence_ends": list(range(3, 30))},
}
MERGES: dict[str, dict[str, Any]] = {
    "representative": {},
    "mean": {"merge_mode": "mean"},
    "learned": {"merge_mode": "learned", "merger_base": "mean", "merger_rank": 8},
}
RATIO = 2.4
NEEDS_2D_INDEX = pytest.mark.skipif(
    not hasattr(modeling_utils, "slice_logits_to_keep"), reason="this Transformers knows no 2D `logits_to_keep`"
)


@dataclass(frozen=True)
class Case:
    """A model of the matrix."""

    family: str
    attention: str = "sdpa"
    positions: str = "original"
    merge: str = "representative"
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return "-".join(str(value).replace("torch.", "") for value in astuple(self) if value != torch.float32)

    @property
    def is_sliding(self) -> bool:
        return self.family in WITH_WINDOWS

    @property
    def is_ragged(self) -> bool:
        return self.attention == VARLEN and not self.is_sliding


def case_of(family: str, attention: str = "sdpa", positions: str = "original", **axes: Any) -> Case:
    """A case in modes that its family knows: GPT-2 counts positions, and SDPA has no soft cap."""
    attention = "eager" if family == "gemma2" else attention
    return Case(family, attention, "compact" if family == "gpt2" else positions, **axes)


def other_cases() -> Iterator[Case]:
    """Families beside Llama without an end, every attention, position mode and merge mode among them."""
    axes = itertools.cycle(itertools.product(ATTENTIONS, POSITIONS, MERGES))
    for family in itertools.cycle(OTHERS):
        attention, positions, merge = next(axes)
        yield case_of(family, attention, positions, merge=merge)


def every_case() -> list[Case]:
    """For what sees how slots were merged."""
    llama = [Case("llama", *axes) for axes in itertools.product(ATTENTIONS, POSITIONS, MERGES)]
    return llama + list(itertools.islice(other_cases(), 2 * len(OTHERS)))


def spread_cases() -> list[Case]:
    """For what sees finished slots alone."""
    merges = itertools.cycle(MERGES)
    llama = [Case("llama", *axes, next(merges)) for axes in itertools.product(ATTENTIONS, POSITIONS)]
    return llama + list(itertools.islice(other_cases(), len(OTHERS)))


def cells(code_paths: Iterable[str], everything: bool = False) -> list[Any]:
    """`pytest.param(case, code_path)`: every code path on Llama, with `everything` in all its cases (with the newest
    Transformers alone), and every other family on a fifth of the code paths, in turn."""
    everything = everything and version.parse(transformers.__version__) >= NEWEST
    chosen, others, code_paths = [], other_cases(), list(code_paths)
    for number, name in enumerate(code_paths):
        cases = spread_cases() if CODE_PATHS[name].is_decoding else every_case()
        llama = [case for case in cases if case.family == "llama"]
        chosen += [(case, name) for case in (llama if everything else [llama[number % len(llama)]])]
        turn = [next(others) for _ in OTHERS]
        chosen += [(case, name) for place, case in enumerate(turn) if (place + number) % 5 == 0]
    return [pytest.param(case, name, id=f"{case}-{name}") for case, name in chosen]


def each_case(cases: Iterable[Case]) -> Any:
    return pytest.mark.parametrize("case", list(cases), ids=str)


def each_cell(code_paths: Iterable[str], everything: bool = False) -> Any:
    return pytest.mark.parametrize(("case", "code_path"), cells(code_paths, everything))


@functools.cache
def weights_of(family: str) -> dict[str, Tensor]:
    """One set of weights for a family and its variants, a merger that is not its base included."""
    model = tiny_model(family=family, **{**SHIPPED, **MERGES["learned"]})
    merger = model.base_model.learned_merger
    torch.nn.init.normal_(merger.out_proj, std=0.3, generator=torch.Generator().manual_seed(1))
    torch.nn.init.normal_(merger.length_vectors, std=0.5, generator=torch.Generator().manual_seed(2))
    return model.state_dict()


def build(case: Case, **fields: Any) -> Any:
    """A new model, for tests that change it."""
    family, variant = FAMILY_FIELDS[case.family]
    given = {"attn_implementation": case.attention, "position_mode": case.positions, "target_ratio": RATIO}
    model = tiny_model(family=family, **{**SHIPPED, **given, **MERGES[case.merge], **variant, **fields})
    mine = model.state_dict().keys()
    model.load_state_dict({name: value for name, value in weights_of(family).items() if name in mine})
    return model.to(case.dtype)


@functools.cache
def model_of(case: Case) -> Any:
    return build(case)


@functools.cache
def plain_of(case: Case) -> Any:
    """The plain twin, one for all modes; that of SDPA where rows of different lengths would have to be exactly it."""
    modes = case_of(case.family, "sdpa" if case.attention == VARLEN else case.attention, dtype=case.dtype)
    return plain_twin(model_of(case)) if case == modes else plain_of(modes)


@functools.cache
def outcome_of(case: Case, code_path: str) -> Outcome:
    """What the compressed model comes to on the code path's batch."""
    return CODE_PATHS[code_path].run(model_of(case), *CODE_PATHS[code_path].batch())


@functools.cache
def plain_outcome(case: Case, code_path: str) -> Outcome:
    """What the plain twin comes to on the same batch."""
    case = case_of(case.family, case.attention, dtype=case.dtype)
    return CODE_PATHS[code_path].run(plain_of(case), *CODE_PATHS[code_path].batch())


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
