import math

import pytest
import torch

from semtoken_hf.evaluation.compressed_perplexity import (
    evaluate_method,
    evaluate_references,
    evaluate_semtoken,
)
from semtoken_hf.evaluation.methods import METHODS
from semtoken_hf.evaluation.texts import make_windows
from tests.fixtures.tiny import plain_twin, random_ids, tiny_model

CONTEXT, TARGET = 60, 12


@pytest.fixture(scope="module")
def model():
    return tiny_model(min_prompt_length=0)


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
    result = evaluate_method("full", model, windows, METHODS["full"], CONTEXT, 1.0)
    labels = windows.clone()
    labels[:, :CONTEXT] = -100
    with torch.no_grad():
        loss = plain_twin(model)(windows, labels=labels).loss
    assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert result.ratio == 1


def test_compressed_context_costs_what_labels_behind_it_cost(model, windows):
    """One forward with labels (law 2) and a prefill with scored tokens behind it are the same measurement."""
    result = evaluate_semtoken("ours", model, windows, CONTEXT, 3.0)
    assert result.ratio == pytest.approx(3.0)
    labels = windows[:1].clone()
    labels[:, :CONTEXT] = -100
    with torch.no_grad():
        expected = model(windows[:1], labels=labels, target_ratio=3.0).loss
    assert float(result.losses[0]) == pytest.approx(float(expected), rel=1e-5)
    full = evaluate_method("full", model, windows, METHODS["full"], CONTEXT, 1.0)
    assert result.perplexity != pytest.approx(full.perplexity, rel=1e-6)


def test_reading_all_tokens_compressed_at_ratio_one_is_the_full_context(model, windows):
    ours = evaluate_semtoken("ours", model, windows, CONTEXT, 1.0)
    full = evaluate_method("full", model, windows, METHODS["full"], CONTEXT, 1.0)
    torch.testing.assert_close(ours.losses, full.losses, rtol=1e-5, atol=1e-5)


def test_references_have_as_many_slots_as_they_say(model, windows):
    results = evaluate_references(model, windows, CONTEXT, [2.4, 4.0])
    slots = {ratio: [round(CONTEXT / r.ratio) for r in of_ratio] for ratio, of_ratio in results.items()}
    assert slots == {2.4: [CONTEXT, 2 + 4, 25, 25], 4.0: [CONTEXT, 2 + 4, 15, 15]}
    # The same object: full context and none are read once.
    assert results[2.4][0] is results[4.0][0]
    assert results[2.4][1] is results[4.0][1]
