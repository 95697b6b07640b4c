"""The side of kvpress, without kvpress: a press that prunes nothing stands in for it."""

import contextlib
import importlib.metadata
import json
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from semtoken_hf.benchmarking.benchmark import benchmark, write_plan
from tests.benchmarking.conftest import LENGTHS, RATIO
from tests.fixtures.scripts import main_of

SLOT = 2 * 2 * 2 * 16 * 4
calls = []


@dataclass
class FakePress:
    compression_ratio: float

    @contextlib.contextmanager
    def __call__(self, model):
        calls.append((type(model).__name__, self.compression_ratio))
        yield


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setitem(sys.modules, "kvpress", SimpleNamespace(FakePress=FakePress, Other=FakePress))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"{name}'s")
    calls.clear()
    return main_of("kvpress_benchmark.py", monkeypatch)


def test_presses_beside_plain_on_the_same_prompts(run, measured, config_of):
    folder, _ = measured
    write_plan(config_of(folder))
    run(folder, "--presses", "FakePress")
    results = json.loads((folder / "kvpress.json").read_text())
    assert [(r["shape"], r["length"], r["ratio"]) for r in results] == [("tiny", n, RATIO) for n in LENGTHS]
    for result in results:
        assert result["variants"].keys() == {"plain", "FakePress"}
        for variant in result["variants"].values():
            assert variant["kv_bytes"] == result["length"] * SLOT
            assert [len(variant[time]) for time in ("prefill", "decode", "generate")] == [2, 2, 2]
            assert all(p < g for p, g in zip(variant["prefill"], variant["generate"], strict=True))
    assert set(calls) == {("LlamaForCausalLM", 1 - 1 / RATIO)}
    before = len(calls)
    run(folder, "--presses", "FakePress")
    assert len(calls) == before
    run(folder, "--presses", "FakePress", "Other")
    results = json.loads((folder / "kvpress.json").read_text())
    assert [{*r["variants"]} for r in results] == [{"plain", "FakePress", "Other"}] * 2

    benchmark(config_of(folder, report=True))
    text = (folder / "benchmark.md").read_text()
    assert "| tiny | 512 | 2 | FakePress |" in text
    assert "kvpress kvpress's" in text
    assert "| tiny | 512 | 2 | SemToken, static |" in text.split("## kvpress")[1]
    (folder / "kvpress.json").unlink()
