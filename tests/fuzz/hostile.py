"""Values that nobody should pass, and numbers around the places where things break."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st

HUGE = (2**31 - 1, 2**31, 2**40, 2**63 - 1, 2**63, 2**70, 10**400)
INTEGERS = (-(2**70), -(2**63), -(2**31), -2, -1, 0, 1, 2, 3, *HUGE)
FLOATS = (math.nan, math.inf, -math.inf, 0.0, -0.0, 0.5, 1.0, 1.5, -1.0, 1e-300, 1e308, 2.0**63, 3.0)
TEXTS = ("", "0", "3", "mean", "greedy", "None", "true", "../..", "/etc/passwd", "\x00", "\ud800", "é" * 3, "x" * 5000)


def deep(depth: int, kind: type) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value} if kind is dict else [value]
    return value


NESTED = ([], {}, [[]], {"a": {}}, [1, [2]], {"model_type": "bert"}, deep(40, dict), deep(40, list), [None], ["a"])

integers = st.sampled_from(INTEGERS) | st.integers(-(2**65), 2**65)
floats = st.sampled_from(FLOATS) | st.floats()
texts = st.sampled_from(TEXTS) | st.text(max_size=8)
nested = st.sampled_from(NESTED) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
# Whatever a JSON file may hold (and a little more).
anything = st.none() | st.booleans() | integers | floats | texts | nested
