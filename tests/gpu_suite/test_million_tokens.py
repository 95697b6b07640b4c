"""Long prompts in chunks, what is told beforehand of their time and memory, and the script for a processor."""

import json
import time

import pytest
import torch

from semtoken_hf.benchmarking.shapes import SHAPES
from semtoken_hf.gpu_suite.million_tokens import bytes_needed, stream_million_tokens
from semtoken_hf.gpu_suite.models import build_model
from semtoken_hf.gpu_suite.streaming import stream_prompt
from tests.fixtures.children import environment
from tests.fixtures.scripts import main_of


def test_memory_of_the_target():
    """80 GB hold a million tokens of Llama 3 8B in slots, and not plain."""
    million, shape, dtype = 2**20, SHAPES["llama-3-8b"], torch.bfloat16
    assert shape.slot_bytes(dtype) * million == pytest.approx(137.4e9, rel=1e-3)
    assert bytes_needed(shape, dtype, million, "semtoken_varlen") < 80 * 2**30
    assert bytes_needed(shape, dtype, million, "sdpa") > bytes_needed(shape, dtype, million, "semtoken_varlen")
    assert bytes_needed(shape, dtype, million // 2, "sdpa") < 80 * 2**30


def test_streaming_reads_the_slots_of_the_whole_prompt():
    model, slot_bytes = build_model(SHAPES["tiny"]), SHAPES["tiny"].slot_bytes(torch.float32)
    record = stream_prompt(model, 1000, 128, time.time() + 100, 2.4, 4)
    assert record["slots"] == 417
    # The last token that was generated was not read.
    assert record["KV bytes"] == slot_bytes * (417 + 3)
    plain = stream_prompt(model, 1000, 128, time.time() + 100, None, 4)
    assert plain["stage s"] is None
    assert plain["KV bytes"] == slot_bytes * 1003
    for found in (record, plain):
        assert found["prefill s"] > 0
        assert found["decode ms"] > 0


def test_the_whole_prompt_where_time_allows(context):
    stream_million_tokens(context)
    assert context.rows[-1]["tokens"] == context.long_length
    assert context.rows[-1]["slots"] == pytest.approx(context.long_length / 2.4, abs=2)
    assert not any("instead of" in note for note in context.notes)


def test_script_reads_in_processes_of_their_own(tmp_path, monkeypatch):
    main, output = main_of("measure_million_tokens.py", monkeypatch), tmp_path / "million.md"
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    main("--lengths", 512, "--plain-seconds", 0, "--output", output)
    (record,) = json.loads(output.with_suffix(".json").read_text())["records"]
    assert record["tokens"] == 512
    assert "| SemToken 2.4x | 512 |" in output.read_text()
