"""SIGKILL, Ctrl-C, a full disk and a second process: nothing half written passes for whole, and the command run again
ends with the result of an undisturbed run.

`scripts/kill_tests.py` kills more often.
"""

from __future__ import annotations

import os

import pytest

from tests.hardening.kill_jobs import JOBS, contents
from tests.hardening.kills import Killer, Moment

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs a fork server and SIGKILL")
TIMES = {"convert": 6, "adapt": 4, "evaluate": 4, "compress-dataset": 4}


@pytest.fixture(scope="module", params=JOBS)
def killer(request, tmp_path_factory):
    return Killer(request.param, tmp_path_factory.mktemp("kills") / request.param)


def half_written(work):
    """Temporary names."""
    names = ("writing",)
    return [p.name for p in work.rglob("*") if ".tmp-" in p.name or ".old-" in p.name or p.name in names]


def spread(killer, variant, places):
    """Numbers of changes at these shares of all changes of a run."""
    killer.undisturbed(variant)
    return [1 + int(place * (killer.changes[variant] - 1)) for place in places]


def test_resuming_a_killed_run_ends_with_the_same_result(killer):
    outcome = killer.kill(TIMES[killer.name])
    assert outcome.failures == []
    assert outcome.kills >= TIMES[killer.name]


@pytest.mark.parametrize("action", ["interrupt", "full"])
def test_what_fails_leaves_nothing_half_written(killer, action):
    error = {"interrupt": "KeyboardInterrupt", "full": "OSError: [Errno 28] No space left on device"}[action]
    variant = killer.job.variants[-1]
    # The last changes are renames, which need no space.
    for change in spread(killer, variant, (0.3, 0.8 if action == "full" else 0.97)):
        work = killer.fresh(variant)
        before = contents(work)
        found = killer.run(work, variant, Moment(change, action=action))
        assert isinstance(found, str)
        assert found.startswith(error)
        killer.job.check(work, killer.whole[variant])
        assert half_written(work) == []
        if killer.name == "convert":
            assert contents(work) == before
    killer.check_end(work, variant)


def test_a_folder_that_cannot_be_written_stays_as_it_is(killer):
    variant = killer.job.variants[-1]
    work = killer.fresh(variant)
    before = contents(work)
    found = killer.run(work, variant, Moment(1, action="read-only"))
    assert isinstance(found, str)
    assert found.startswith("OSError: [Errno 30] Read-only file system")
    assert contents(work) == before


def test_two_at_once(killer):
    """One of them may be refused; the result is whole."""
    refused = {"convert": "FileExistsError", "adapt": "ValueError: another adaptation is running"}
    refused["evaluate"] = "ValueError: another evaluation is running"
    refused["compress-dataset"] = "ValueError: another compression of documents is running"
    variant = killer.job.variants[0]
    for _ in range(3 if killer.name == "convert" else 1):
        work = killer.fresh(variant)
        both = [killer.start(work, variant) for _ in range(2)]
        found = [killer.end(*one) for one in both]
        assert any(isinstance(one, int) for one in found), found
        assert all(isinstance(one, int) or one.startswith(refused[killer.name]) for one in found), found
        assert killer.job.result(work) == killer.whole[variant]
        assert not killer.job.leftovers(work)
