import math
import statistics

import pytest
import torch

from semtoken_hf.evaluation.compressed_perplexity import (
    PerplexityResult,
    context_gain_kept,
    evaluate_reader,
    keep_ends,
    keep_random,
    make_windows,
    perplexity_table,
    read_compressed,
    read_subset,
    reference_readers,
)
from tests.fixtures.tiny import plain_twin, random_ids, tiny_model

CONTEXT, TARGET = 60, 12


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def windows():
    return make_windows(random_ids(1, 400)[0], CONTEXT, TARGET, bos_id=1, limit=3)


def test_windows_are_consecutive_and_opened_by_bos():
    ids = torch.arange(10, 110)
    windows = make_windows(ids, 30, 10, bos_id=1, limit=9)
    assert windows.shape == (2, 40)
    assert windows[:, 0].tolist() == [1, 1]
    assert windows[1, 1:].tolist() == list(range(51, 90))
    assert ids[0] == 10
    with pytest.raises(ValueError, match="one window needs 200"):
        make_windows(ids, 100, 100, bos_id=1, limit=1)


def test_full_context_is_the_plain_perplexity(model, windows):
    result = evaluate_reader("full", model, windows, read_subset(CONTEXT, torch.arange), CONTEXT)
    labels = windows.clone()
    labels[:, :CONTEXT] = -100
    with torch.no_grad():
        loss = plain_twin(model)(windows, labels=labels).loss
    assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert result.ratio == 1


def test_compressed_context_reads_the_slots_of_the_stage(model, windows):
    result = evaluate_reader("ours", model, windows, read_compressed(CONTEXT, target_ratio=3.0), CONTEXT)
    assert result.ratio == pytest.approx(3.0)
    labels = windows[:1].clone()
    labels[:, :CONTEXT] = -100
    with torch.no_grad():
        assert result.losses[0] == pytest.approx(float(model(windows[:1], labels=labels, target_ratio=3.0).loss))
    full = evaluate_reader("full", model, windows, read_subset(CONTEXT, torch.arange), CONTEXT)
    assert result.perplexity != pytest.approx(full.perplexity, rel=1e-6)


def test_reading_all_tokens_compressed_at_ratio_one_is_the_full_context(model, windows):
    ours = evaluate_reader("ours", model, windows, read_compressed(CONTEXT, target_ratio=1), CONTEXT)
    full = evaluate_reader("full", model, windows, read_subset(CONTEXT, torch.arange), CONTEXT)
    torch.testing.assert_close(ours.losses, full.losses, rtol=1e-5, atol=1e-5)


def test_references_keep_what_they_say(model):
    assert keep_ends(2, 3)(10).tolist() == [0, 1, 7, 8, 9]
    assert keep_ends(4, 9)(6).tolist() == [0, 1, 2, 3, 4, 5]
    chosen = keep_random(8, 2, 3, seed=0)(20).tolist()
    assert len(chosen) == 8
    assert chosen == sorted(set(chosen))
    assert {0, 1, 17, 18, 19} <= set(chosen)
    readers = reference_readers(model.config, CONTEXT, kept=25)
    window = random_ids(1, CONTEXT + TARGET)
    kept = {name: int(read(model, window)[1]) for name, read in readers.items()}
    assert list(kept.values()) == [CONTEXT, 2 + 4, 25, 25]


def test_context_gain():
    def result(perplexity):
        return type("R", (), {"perplexity": perplexity})()

    assert context_gain_kept(result(12.0), result(10.0), result(20.0)) == pytest.approx(0.8)


def test_the_table_says_cost_spread_and_gain():
    full = PerplexityResult("full", 10.0, 1.0, torch.tensor([2.0, 2.4, 2.2]))
    none = PerplexityResult("none", 20.0, 30.0, torch.tensor([3.0, 3.0, 3.0]))
    ours = PerplexityResult("ours", 12.5, 2.4, torch.tensor([2.1, 2.6, 2.5]))
    lines = perplexity_table([full, none, ours], full, none)
    assert len(lines) == 5
    spread = 100 * (math.exp(statistics.stdev([0.1, 0.2, 0.3]) / 3**0.5) - 1)
    assert lines[-1] == f"| ours | 2.40 | 12.50 | +25.0 % | {spread:.1f} % | 75 % |"
