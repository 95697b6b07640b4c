"""Long prompts in chunks, what is told beforehand of their time and memory, and the script for a processor."""

import json
import sys
import time
from dataclasses import replace

import pytest
import torch

from semtoken_hf.benchmarking.clock import peak_extra_bytes
from semtoken_hf.benchmarking.shapes import SHAPES
from semtoken_hf.gpu_suite import million_tokens
from semtoken_hf.gpu_suite.million_tokens import bytes_needed, predict_seconds, stream_million_tokens
from semtoken_hf.gpu_suite.models import build_model, prompts
from semtoken_hf.gpu_suite.parts import TimeUp
from semtoken_hf.gpu_suite.streaming import stream_prompt
from tests.fixtures.children import environment
from tests.fixtures.scripts import main_of


def record_of(tokens, seconds):
    return {"tokens": tokens, "prefill s": seconds}


def test_time_is_told_from_two_shorter_prompts():
    def seconds(n):
        return 3e-3 * n + 2e-6 * n * n

    short, longer = (record_of(n, seconds(n)) for n in (1000, 4000))
    assert predict_seconds(short, longer, 32000) == pytest.approx(million_tokens.CAUTION * seconds(32000))
    # Noise must not make long prompts cheap.
    falling = predict_seconds(record_of(1000, 4.0), record_of(4000, 8.0), 32000)
    assert falling == pytest.approx(million_tokens.CAUTION * 2e-3 * 32000)


def test_memory_of_the_target():
    """80 GB hold a million tokens of Llama 3 8B in slots, and not plain."""
    million, shape, dtype = 2**20, SHAPES["llama-3-8b"], torch.bfloat16
    assert shape.slot_bytes(dtype) * million == pytest.approx(137.4e9, rel=1e-3)
    assert bytes_needed(shape, dtype, million, "semtoken_varlen") < 80 * 2**30
    assert bytes_needed(shape, dtype, million, "sdpa") > bytes_needed(shape, dtype, million, "semtoken_varlen")
    assert bytes_needed(shape, dtype, million // 2, "sdpa") < 80 * 2**30


def test_memory_of_making_the_slots():
    """Where keys and values are small beside the embeddings, the stage needs more than what reads its slots."""
    shape, length = replace(SHAPES["tiny"], hidden_size=4096, num_attention_heads=256), 240_000
    slots = 100_000
    fingerprints, embeddings = 4 * 64 * (length + slots), 4 * 4096 * slots
    needed = bytes_needed(shape, torch.float32, length, "semtoken_varlen")
    weights = shape.weight_bytes(torch.float32)
    assert needed == weights + million_tokens.SPARE_BYTES + fingerprints + 3 * embeddings


@torch.no_grad()
def test_peak_of_the_stage_is_what_is_foretold():
    # Long enough that what a process needs once is little of it.
    shape, length = SHAPES["tiny"], 2**18
    model, ids = build_model(shape), prompts((length,)).input_ids
    peak, _ = peak_extra_bytes(lambda: model.compress(ids), torch.device("cpu"))
    if peak is None:
        pytest.skip("this system does not tell the peak of a process")
    needed = bytes_needed(shape, torch.float32, length, "semtoken_varlen") - million_tokens.SPARE_BYTES
    assert 0.5 < peak / (needed - shape.weight_bytes(torch.float32)) < 2


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


def test_streaming_stops_in_time():
    model = build_model(SHAPES["tiny"])
    with pytest.raises(TimeUp):
        stream_prompt(model, 1000, 128, time.time() - 1, 2.4)
    # Nothing of it is left on the model.
    assert not model.model.layers[0]._forward_pre_hooks


def test_the_whole_prompt_where_time_allows(context):
    stream_million_tokens(context)
    assert context.rows[-1]["tokens"] == context.long_length
    assert context.rows[-1]["slots"] == pytest.approx(context.long_length / 2.4, abs=2)
    assert not any("instead of" in note for note in context.notes)


def test_a_shorter_prompt_where_time_does_not_allow(context, monkeypatch):
    monkeypatch.setattr(million_tokens, "SHORTEST", 256)
    monkeypatch.setattr(million_tokens, "predict_seconds", lambda short, longer, n: 1e9 if n > 256 else 1.0)
    stream_million_tokens(context)
    assert context.rows[-1]["tokens"] == 256
    assert sum("would take" in note for note in context.notes) == 2
    assert "256 tokens instead of 1,024." in context.notes


def test_a_shorter_prompt_where_memory_does_not_allow(context, monkeypatch):
    monkeypatch.setattr(million_tokens, "SHORTEST", 512)
    stream = million_tokens.stream_prompt

    def small_device(model, length, *rest):
        if length > 512:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return stream(model, length, *rest)

    monkeypatch.setattr(million_tokens, "stream_prompt", small_device)
    stream_million_tokens(context)
    assert context.rows[-1]["tokens"] == 512
    assert any("out of memory" in note for note in context.notes)
    assert "512 tokens instead of 1,024." in context.notes


@pytest.fixture
def script(monkeypatch):
    """The script's module and its main as a function of arguments."""
    main = main_of("measure_million_tokens.py", monkeypatch)
    module = sys.modules["measure_million_tokens_script"]
    return module, main


def test_script_reads_in_processes_of_their_own(script, tmp_path, monkeypatch):
    _, main = script
    output = tmp_path / "million.md"
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    main("--lengths", 512, "--plain-seconds", 0, "--output", output)
    (record,) = json.loads(output.with_suffix(".json").read_text())["records"]
    assert record["tokens"] == 512
    assert "| SemToken 2.4x | 512 |" in output.read_text()


def test_script_leaves_out_what_takes_too_long(script, tmp_path, monkeypatch):
    module, main = script
    asked = []

    def read(way, length):
        asked.append((way, length))
        arguments = module.parse_arguments()
        arguments.plain_seconds = -1
        return module.read_once(arguments, length, way == "plain")

    monkeypatch.setattr(module, "read_in_child", read)
    output = tmp_path / "million.md"
    main("--lengths", 512, 256, "--chunk", 128, "--new-tokens", 3, "--output", output)
    assert asked == [("SemToken", 256), ("SemToken", 512), ("plain", 256)]
    assert "| plain | 256 | over -1 s |" in output.read_text()
    assert len(json.loads(output.with_suffix(".json").read_text())["records"]) == 3
