import contextlib
import json

import torch

from semtoken_hf import span_planner
from semtoken_hf.benchmarking import compiled
from semtoken_hf.benchmarking import stage as stage_module
from semtoken_hf.benchmarking.benchmark import benchmark
from semtoken_hf.benchmarking.cells import Bench
from semtoken_hf.benchmarking.compiled import compare, compiled_parts
from semtoken_hf.span_planner import build_layout
from tests.benchmarking.conftest import LENGTHS, RATIO


def test_the_stage_alone(config_of, tmp_path, monkeypatch):
    config = config_of(tmp_path, stage_only=True)
    benchmark(config)
    results = json.loads((tmp_path / "benchmark.json").read_text())["stage"]
    assert [r["length"] for r in results] == LENGTHS
    for result in results:
        assert result["slots"] == [result["length"] // RATIO]
        assert [len(result[name]) for name in ("seconds", "encoder_seconds", "stages")] == [2, 2, 2]
        assert "encoder" not in result["stages"][0]
        assert min(result["encoder_seconds"]) > 0
        assert result["peak_bytes"] is None or result["peak_bytes"] >= 0
    text = (tmp_path / "benchmark.md").read_text()
    assert "| tiny | static | 512 | 2 | 256 |" in text
    assert "## Time and memory" not in text

    monkeypatch.setattr(stage_module, "Bench", None)
    benchmark(config)


def test_the_encoder_takes_no_part_in_the_stage_s_own_seconds(config_of, tmp_path):
    bench = Bench(config_of(tmp_path), "tiny", 256, layers=1)
    assert len(bench.model.model.layers) == 1
    calls = []
    bench.model.model.semantic_encoder.encoder.embeddings.register_forward_hook(lambda *_: calls.append(None))
    found = stage_module.measure_stage(bench, 256, RATIO)
    # Once to learn the fingerprints, and for its own seconds in three rounds, of which the first is left out.
    assert len(calls) == 1 + 3
    assert len(found["seconds"]) == 2


def test_a_stage_that_does_not_fit_is_skipped_and_the_report_says_so(config_of, tmp_path, monkeypatch):
    monkeypatch.setattr(stage_module, "measure_stage", lambda *_: {**MADE_UP, "peak_bytes": 256 * 10})
    monkeypatch.setattr(stage_module, "available_bytes", lambda device: 512 * 10 - 1)
    benchmark(config_of(tmp_path, stage_only=True))
    first, second = json.loads((tmp_path / "benchmark.json").read_text())["stage"]
    assert "skipped" not in first
    assert "predicted to need" in second["skipped"]
    assert "- stage alone, tiny, static, 512: predicted to need" in (tmp_path / "benchmark.md").read_text()


MADE_UP = {"slots": [128], "seconds": [1.0], "encoder_seconds": [1.0], "stages": [{}]}


def test_compiled_beside_eager(config_of, tmp_path, monkeypatch):
    """The compiler itself takes minutes: what it is given stands in for what it makes."""
    given = []
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: given.append(f) or f)
    benchmark(config_of(tmp_path, compile=True, lengths=[256]))
    (result,) = json.loads((tmp_path / "benchmark.json").read_text())["compiled"]
    assert [r["what"] for r in result["records"]] == ["stage", "decode, plain", "decode, SemToken"]
    assert all(len(r["eager"]) == len(r["compiled"]) == 7 for r in result["records"])
    assert sorted(getattr(f, "__name__", type(f).__name__) for f in given) == [
        "LlamaForCausalLM",
        "SemTokenLlamaForCausalLM",
        "build_layout",
        "find_span_starts",
        "merge_spans",
    ]
    assert "| tiny | 256 | 2 | decode, SemToken |" in (tmp_path / "benchmark.md").read_text()


def test_what_does_not_compile_is_a_finding(config_of, tmp_path):
    def fail():
        raise RuntimeError("no | compiler\nhere")

    found = compare(lambda: None, fail, config_of(tmp_path))
    assert found["error"] == "RuntimeError: no | compiler"
    assert len(found["eager"]) == 7
    assert found["compiled"] == []


def test_graph_breaks_are_counted(config_of, tmp_path):
    def broken(x):
        x = x + 1
        torch._dynamo.graph_break()
        return x + 1

    function, x = torch.compile(broken, backend="eager"), torch.ones(3)
    found = compare(lambda: broken(x), lambda: function(x), config_of(tmp_path))
    assert (found["graph_breaks"], found["graphs"]) == (1, 2)


def test_compiled_parts_are_put_back(monkeypatch):
    monkeypatch.setattr(compiled.torch, "compile", lambda f, dynamic: None)
    with contextlib.suppress(KeyError), compiled_parts({}):
        assert span_planner.build_layout is None
        raise KeyError
    assert span_planner.build_layout is build_layout
