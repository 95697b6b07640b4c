"""Clocks and counters, with a clock that ticks once a reading where seconds matter."""

import itertools

import pytest
import torch

from semtoken_hf import compression, span_planner
from semtoken_hf.benchmarking import stage_clock
from semtoken_hf.benchmarking.clock import (
    TokenStamps,
    available_bytes,
    median_ratio,
    peak_extra_bytes,
    rounds_left,
    seconds_of,
    summary,
)
from semtoken_hf.benchmarking.stage_clock import ReplayedEncoder, StageClock
from tests.fixtures.tiny import ragged_prompts, random_ids, tiny_model

CPU = torch.device("cpu")


@pytest.fixture
def ticks(monkeypatch):
    count = itertools.count()
    monkeypatch.setattr(stage_clock, "timer", lambda: float(next(count)))
    return count


def test_seconds_are_those_of_one_call():
    calls = []
    assert seconds_of(lambda: calls.append(None)) > 0
    assert len(calls) == 1


def test_ratios_are_taken_within_each_round():
    assert median_ratio([2.0, 20.0, 3.0], [1.0, 10.0, 3.0]) == 2.0
    with pytest.raises(ValueError, match="argument 2"):
        median_ratio([1.0], [1.0, 2.0])


def test_summary():
    assert summary([1.0, 2.0, 3.0, 4.0, 100.0]) == {"median": 3.0, "iqr": 2.0, "samples": 5}


@pytest.mark.parametrize(("first", "rounds"), [(1.0, 7), (10.0, 5), (30.0, 1), (31.0, 0), (600.0, 0)])
def test_rounds_fit_the_time(first, rounds):
    assert rounds_left(first, 60.0, 7) == rounds


def test_stamps_of_tokens():
    model, ids = tiny_model(), random_ids(2, 40)
    stamps = TokenStamps()
    model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, streamer=stamps)
    assert len(stamps.stamps) == 1 + 5
    assert stamps.begin < stamps.stamps[0] < stamps.stamps[1]
    stamps.begin, stamps.stamps = 1.0, [2.0, 4.0, 5.0, 8.0]
    assert (stamps.to_first_token, stamps.per_token) == (3.0, 2.0)


def test_peak_memory_sees_what_is_let_go_again():
    size = 64 << 20

    def call():
        for _ in range(2):
            held = torch.ones(size // 4)
            held += 1
        return "result"

    peak, result = peak_extra_bytes(call, CPU)
    assert result == "result"
    if peak is None:
        pytest.skip("this system does not tell the peak of a process")
    assert size <= peak < 3 * size
    again, _ = peak_extra_bytes(lambda: None, CPU)
    assert again < size / 4
    assert available_bytes(CPU) > 0


def test_every_part_of_the_stage_is_seen_and_left_as_it_was(ticks):
    model, (ids, mask) = tiny_model(merge_mode="learned", segmentation_mode="greedy"), ragged_prompts()
    encoder, original = model.model.semantic_encoder, span_planner.find_span_starts
    expected = model.compress(ids, mask).span_ids
    with StageClock(encoder) as clock:
        assert span_planner.find_span_starts is not original
        assert torch.equal(model.compress(ids, mask).span_ids, expected)
    assert dict(clock.calls) == {"rest": 1, "layout": 1, "encoder": 1, "span starts": 1, "merging": 1}
    # Each of the four inner parts takes one tick, and lies between two of the outermost one's five.
    assert dict(clock.seconds) == {"rest": 5.0, "layout": 1.0, "encoder": 1.0, "span starts": 1.0, "merging": 1.0}
    assert span_planner.find_span_starts is original
    assert compression.merge_spans.__module__ == "semtoken_hf.span_merging"
    assert not hasattr(compression.merge_spans, "__wrapped__")
    assert "forward" not in vars(encoder)
    model.compress(ids, mask)
    assert sum(clock.calls.values()) == 5


def test_parts_are_left_as_they_were_behind_an_error(ticks):
    model = tiny_model()
    clock = StageClock(model.model.semantic_encoder)
    with pytest.raises(ValueError, match="attention_mask"), clock:
        model.compress(random_ids(1, 64), torch.ones(1, 3))
    assert clock._running == []
    assert not hasattr(span_planner.find_span_starts, "__wrapped__")


def test_a_replayed_encoder_gives_the_same_plan_without_running(monkeypatch):
    model, ids = tiny_model(), random_ids(1, 200)
    encoder = model.model.semantic_encoder
    expected = model.compress(ids)
    replayed = ReplayedEncoder(encoder, lambda: model.compress(ids))
    table = encoder.encoder.embeddings.weight.data.clone()
    encoder.encoder.embeddings.weight.data.fill_(torch.nan)
    with replayed:
        for _ in range(2):
            assert torch.equal(model.compress(ids).span_ids, expected.span_ids)
    assert "forward" not in vars(encoder)
    encoder.encoder.embeddings.weight.data.copy_(table)
    assert torch.equal(model.compress(ids).span_ids, expected.span_ids)
