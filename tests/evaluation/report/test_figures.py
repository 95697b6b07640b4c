import pytest

from semtoken_hf.evaluation.report.figures import (
    cost_against,
    cost_against_speed,
    gain_against_memory,
    methods_only,
    pareto_front,
    ratios_of,
    ways_of,
)
from tests.fixtures.metrics import make_metrics

POINTS = [(1.0, 5.0), (2.0, 3.0), (2.0, 4.0), (3.0, 3.0), (4.0, 1.0), (5.0, 6.0)]


@pytest.fixture
def metrics():
    return make_metrics()


def test_pareto_front():
    assert pareto_front(POINTS) == [(1.0, 5.0), (2.0, 3.0), (4.0, 1.0)]
    assert pareto_front(POINTS, higher_is_better=True) == [(1.0, 5.0), (5.0, 6.0)]
    assert pareto_front([]) == []


def test_ways_are_in_the_order_of_their_families(metrics):
    assert [w.method for w in ways_of(methods_only(metrics)[::-1])] == [
        "full",
        "none",
        "truncation",
        "kvpress_SnapKV",
        "semtoken",
    ]


def test_cost_against_memory_and_time(metrics):
    cells = methods_only(metrics)
    series = {s.way.method: s.points for s in cost_against(cells, "wikitext", "kv_share")}
    own = [c for c in cells if c["task"] == "wikitext" and c["method"] == "semtoken"]
    assert series["semtoken"] == sorted((c["kv_share"], c["cost"]) for c in own)
    timed = {
        s.way.method: s.points for s in cost_against_speed(cells, metrics["speed"], "wikitext", 2048, "end_to_end_ms")
    }
    assert timed == {"full": [(456.0, 0.0)], "semtoken": [(331.0, own[0]["cost"])]}


def test_gain_is_meant_over_tasks_in_which_context_helps(metrics):
    cells = methods_only(metrics)
    series, tasks, left_out = gain_against_memory(cells)
    assert tasks == ["HotpotQA", "needle in a haystack"]
    assert left_out == []
    points = next(s.points for s in series if s.way.method == "semtoken")
    own = [c for c in cells if c["task"] == "needle" and c["method"] == "semtoken"]
    for point, wanted in zip(points, sorted((c["kv_share"], c["gain_kept"]) for c in own), strict=True):
        assert point == pytest.approx(wanted)

    none = next(c for c in cells if c["task"] == "needle" and c["method"] == "none")
    none["spread"] = 0.4
    assert gain_against_memory(cells)[1] == ["HotpotQA"]
    cells = [c for c in cells if (c["task"], c["method"]) != ("hotpotqa", "truncation")]
    assert gain_against_memory(cells)[2] == ["truncation (first + last)"]


def test_ratios(metrics):
    assert ratios_of(metrics) == [2.4, 4.0]
    metrics["config"]["ratios"] = [3.0]
    assert ratios_of(metrics) == [2.4, 4.0]
    assert ratios_of({**metrics, "cells": []}) == [None]
