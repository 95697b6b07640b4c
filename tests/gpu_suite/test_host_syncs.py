"""Where the host waits, with a device that is only pretended."""

import warnings

import pytest
import torch

from semtoken_hf.gpu_suite.host_syncs import HostSyncs, count_host_syncs

CUDA = torch.device("cuda")


@pytest.fixture
def pretended(monkeypatch):
    """Modes that were set on a CUDA device that is not there."""
    modes = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    return modes


def wait():
    warnings.warn("called a synchronizing CUDA operation", stacklevel=1)


def test_warnings_of_a_device_are_counted_by_place(pretended):
    with HostSyncs("cuda") as syncs:
        for _ in range(2):
            wait()
        warnings.warn("of something else", stacklevel=1)
        wait()
    assert syncs.count == 3
    assert [place.split(":")[0] for place in syncs.places] == ["test_host_syncs.py"]
    assert pretended == ["warn", "default"]


def test_calls_that_would_wait():
    values = torch.arange(6)
    with HostSyncs("cpu") as syncs:
        values[values > 2]
        values.nonzero()
        values.max().item()
        values.tolist()
        values.repeat_interleave(values)
    assert syncs.count == 5
    with HostSyncs("cpu", forbid=True):
        values[values]
        values.where(values > 2, 0).cumsum(0)
        values.repeat_interleave(values, output_size=15)


def test_every_setting_is_counted(context, monkeypatch):
    count_host_syncs(context)
    calls = {(row["call"], row["setting"]) for row in context.rows}
    assert {call for call, _ in calls} == {"compress", "decode step"}
    assert ("compress", "transformer encoder, ragged batch") in calls
    assert {row["waits"] for row in context.rows if row["setting"] == "sdpa, one row"} == {0}
    assert {row["waits"] for row in context.rows if row["call"] == "compress"} == {1}
    assert all("span_planner.py" in row["places"] for row in context.rows if row["call"] == "compress")
    assert all(context.checks.values())
