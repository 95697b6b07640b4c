"""A whole benchmark of the tiny shape: what is written, and that it is what it says. No time is asserted."""

import dataclasses
import json
import math

import pytest

from semtoken_hf.benchmarking import benchmark as command
from semtoken_hf.benchmarking import cells
from semtoken_hf.benchmarking.variants import PADDED, PLAIN_M, PLAIN_N, RAGGED
from tests.benchmarking.conftest import LENGTHS, RATIO

# 2 layers, keys and values, 2 heads of 16, float32
SLOT = 2 * 2 * 2 * 16 * 4
ROWS = {"1": lambda n: [n], "skewed": lambda n: [n, n // 8, n // 8, n // 8]}


def test_every_cell_is_there_with_every_sample(measured):
    _, found = measured
    assert [(c["batch"], c["length"]) for c in found["cells"]] == [(b, n) for b in ROWS for n in LENGTHS]
    for cell in found["cells"]:
        assert (cell["shape"], cell["encoder"], cell["dtype"], cell["ratio"]) == ("tiny", "static", "float32", RATIO)
        assert cell["rows"] == ROWS[cell["batch"]](cell["length"])
        assert cell["skipped"] == {}
        assert cell["warmed_up"]
        assert cell["provenance"].keys() == {"command", "versions", "machine", "date"}
        for variant in cell["variants"].values():
            assert [len(variant[time]) for time in cells.TIMES] == [2, 2, 2]
            for first, step, whole in zip(*(variant[time] for time in cells.TIMES), strict=True):
                assert min(first, step) > 0
                assert first + 3 * step == pytest.approx(whole, rel=0.5, abs=0.05)
            assert variant["peak_bytes"] >= 0
        assert len(cell["stages"]) == len(cell["stage"]) == 2
        assert {*cell["stages"][0]} == {"layout", "encoder", "span starts", "merging", "rest"}


def test_slots_are_what_each_way_claims(measured):
    for cell in measured[1]["cells"]:
        rows, variants = cell["rows"], cell["variants"]
        budgets = [math.ceil(n / RATIO) if n >= 16 else n for n in rows]
        assert variants[PLAIN_N]["slots"] == rows
        assert variants[PADDED]["slots"] == variants[PLAIN_M]["slots"]
        # Short rows are mostly protected.
        assert variants[PADDED]["slots"][0] == budgets[0]
        assert all(b <= s <= n for b, s, n in zip(budgets, variants[PADDED]["slots"], rows, strict=True))


def test_kv_bytes_are_exact(measured):
    for cell in measured[1]["cells"]:
        assert cell["slot_bytes"] == SLOT
        for name, variant in cell["variants"].items():
            padded = len(variant["slots"]) * max(variant["slots"])
            if name == RAGGED:
                # Every row may have a little room to grow into.
                own = sum(variant["slots"]) * SLOT
                assert own <= variant["kv_bytes"] <= 1.1 * own + 32 * len(variant["slots"]) * SLOT
            else:
                assert variant["kv_bytes"] == padded * SLOT


def test_report_and_plot(measured):
    folder, found = measured
    text = (folder / "benchmark.md").read_text()
    for cell in found["cells"]:
        slots = " + ".join(f"{n:,}" for n in cell["variants"][PADDED]["slots"])
        row = f"| tiny | static | {cell['batch']} | {cell['length']} | 2 | SemToken | {slots} |"
        assert row in text
        bytes_per_slot = cell["variants"][PADDED]["kv_bytes"] / sum(cell["variants"][PADDED]["slots"]) / SLOT
        (line,) = (line for line in text.splitlines() if line.startswith(row))
        assert f"| {bytes_per_slot:.2f} |" in line
    assert "no timings of theirs" in text
    assert text.count("not measured |") == 8
    assert found["cells"][0]["provenance"]["versions"] in text
    assert (folder / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_there_is_not_measured_again(measured, config_of, monkeypatch):
    folder, found = measured

    def refuse(*args, **kwargs):
        raise AssertionError("measured again")

    monkeypatch.setattr(cells, "Bench", refuse)
    command.benchmark(config_of(folder))
    assert json.loads((folder / "benchmark.json").read_text())["cells"] == found["cells"]
    with pytest.raises(AssertionError, match="again"):
        command.benchmark(config_of(folder, new_tokens=5))
    with pytest.raises(AssertionError, match="again"):
        command.benchmark(config_of(folder, lengths=[*LENGTHS, 300]))


def test_a_way_that_takes_too_long_is_skipped_and_the_report_says_so(measured, config_of, tmp_path):
    folder, _ = measured
    config = dataclasses.replace(config_of(tmp_path), batches=["1"], max_seconds=1e-3)
    short, long = cells.list_cells(config, "tiny")
    short.path(tmp_path).parent.mkdir()
    result = json.loads(short.path(folder).read_text())
    result["variants"][PLAIN_M]["generate"] = [1e-4, 1e-4]
    short.path(tmp_path).write_text(json.dumps(result))
    command.benchmark(config)
    found = json.loads(long.path(tmp_path).read_text())
    assert found["variants"].keys() == {PLAIN_M}
    assert found["skipped"].keys() == {PLAIN_N, PADDED}
    assert not found["warmed_up"]
    assert len(found["variants"][PLAIN_M]["generate"]) == 1
    text = (tmp_path / "benchmark.md").read_text()
    assert "1, 512, 2, SemToken: predicted to take" in text
    assert "one round, without another one to warm up" in text


@pytest.mark.parametrize(("seconds", "free", "reason"), [(4.0, 99, None), (3.9, 99, "take 4 s"), (4.0, 19, "need 0.0")])
def test_time_is_predicted_by_the_square_and_memory_by_the_length(seconds, free, reason):
    before = [
        {"length": 50, "variants": {"a": {"generate": [0.1], "peak_bytes": 9}}},
        {"length": 100, "variants": {"a": {"generate": [3.0, 1.0], "peak_bytes": 10}}},
        {"length": 150, "variants": {}},
    ]
    found = cells.why_skip("a", 200, before, seconds, free)
    assert found is None if reason is None else reason in found
    assert cells.why_skip("b", 200, before, seconds, free) is None
