import json

import torch

from semtoken_hf.benchmarking import stage as stage_module
from semtoken_hf.benchmarking.benchmark import benchmark
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
