"""Weights of auxiliary tasks over a run."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semtoken_hf.training.task_schedule import SCHEDULES, TaskSchedule

SHARES = [i / 20 for i in range(21)]


def weights(**fields):
    schedule = TaskSchedule(**fields)
    return [schedule.weight_at(share) for share in SHARES]


def test_diminish_decays_exponentially():
    ours = weights(kind="diminish", weight=0.5, rate=3.0, power=2.0)
    assert ours[0] == 0.5
    assert ours[10] == pytest.approx(0.5 * math.exp(-3.0 * 0.5**2))
    assert ours[20] == pytest.approx(0.5 * math.exp(-3.0))
    assert ours == sorted(ours, reverse=True)


def test_switch_drops_the_tasks():
    ours = weights(kind="switch", weight=0.7, switch_at=0.35)
    assert ours == [0.7 if share < 0.35 else 0.0 for share in SHARES]


@given(
    kind=st.sampled_from(SCHEDULES),
    weight=st.floats(0, 10),
    rate=st.floats(0, 50),
    power=st.floats(0.1, 4),
    switch_at=st.floats(0, 1),
)
def test_no_weight_grows_or_leaves_its_range(kind, weight, rate, power, switch_at):
    ours = weights(kind=kind, weight=weight, rate=rate, power=power, switch_at=switch_at)
    assert all(0 <= later <= earlier <= weight for earlier, later in itertools.pairwise(ours))


@pytest.mark.parametrize("fields", [{"kind": "linear"}, {"weight": -0.1}, {"switch_at": 1.1}])
def test_nonsense_is_refused(fields):
    with pytest.raises(ValueError, match="task schedule"):
        TaskSchedule(**fields)
