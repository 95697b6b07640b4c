"""A few calls of every family, always the same ones; `scripts/fuzz.py` makes many more."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from .families import FAMILIES
from .judging import judge

EXAMPLES = 40


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_calls_end_well(name: str) -> None:
    family = FAMILIES[name]

    @settings(
        max_examples=round(EXAMPLES * family.weight),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(family.cases)
    def call(case: Any) -> None:
        verdict = judge(family, case)
        assert verdict.kind != "failure", f"{verdict.detail}\n{verdict.trace}"

    call()
