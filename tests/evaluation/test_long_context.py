import math

import pytest
import torch

from semtoken_hf.evaluation import long_context
from semtoken_hf.evaluation.cells import load_model, load_tokenizer
from semtoken_hf.evaluation.configuration import EvaluationConfig
from semtoken_hf.evaluation.long_context import measure_long_contexts
from tests.fixtures.evaluation_data import write_checkpoint
from tests.fixtures.text import PROSE
from tests.fixtures.tiny import plain_twin

POSITIONS, TARGET = 96, 16
SLOTS = POSITIONS - TARGET


@pytest.fixture
def config_of(tmp_path):
    """A model of few positions and a text of about 1900 tokens."""
    checkpoint = write_checkpoint(tmp_path / "short", max_position_embeddings=POSITIONS)
    (tmp_path / "text.txt").write_text(PROSE * 6)

    def make(lengths):
        paths = {"checkpoint": str(checkpoint), "haystack": str(tmp_path / "text.txt")}
        return EvaluationConfig(**paths, target_length=TARGET, lengths=lengths, fraction=0.25)

    return make


def test_more_text_in_the_same_slots_is_read_beside_the_same_slots_of_recent_text(config_of):
    config = config_of([64, SLOTS, 160, 400, 10**6])
    records = measure_long_contexts(config)
    # What the model has positions for is no long context, and what the text lacks cannot be read.
    assert [(r["length"], r["slots"]) for r in records] == [(SLOTS, SLOTS), (160, SLOTS), (400, SLOTS)]
    assert records[0]["title"] == "the last 80 tokens, plain"
    assert {r["examples"] for r in records} == {6}
    for record in records:
        assert record["perplexity"] == pytest.approx(math.exp(record["nll"]))
    assert len({round(r["nll"], 6) for r in records}) == 3


def test_every_way_scores_the_same_targets_within_the_positions_of_the_model(config_of, monkeypatch):
    config = config_of([160])
    model, tokenizer = load_model(config.checkpoint), load_tokenizer(config.checkpoint)
    ids = torch.tensor(tokenizer(PROSE * 6, add_special_tokens=False)["input_ids"])
    seen, original = [], long_context.score_target

    def score_target(model, prefill, target):
        seen.append((prefill.slots, prefill.next_position, target.tolist()))
        return original(model, prefill, target)

    monkeypatch.setattr(long_context, "score_target", score_target)
    plain = measure_long_contexts(config)[0]
    assert [(slots, position) for slots, position, _ in seen] == [(SLOTS, SLOTS)] * len(seen)
    targets = [target for *_, target in seen]
    assert targets[:6] == targets[6:]
    # The plain model over the last tokens, by hand.
    losses = []
    for target in targets[:6]:
        (end,) = [i for i in range(160, len(ids), TARGET) if ids[i : i + TARGET].tolist() == target][:1]
        context = torch.cat([torch.tensor([tokenizer.bos_token_id]), ids[end - SLOTS + 1 : end]])
        labels = torch.full((SLOTS + TARGET,), -100)
        labels[SLOTS:] = ids[end : end + TARGET]
        with torch.no_grad():
            whole = torch.cat([context, ids[end : end + TARGET]])[None]
            losses.append(plain_twin(model)(whole, labels=labels[None]).loss.item())
    assert plain["nll"] == pytest.approx(sum(losses) / 6, rel=1e-3)


@pytest.mark.parametrize("lengths", [[], [SLOTS], [10**6]])
def test_nothing_is_measured_where_no_context_is_long(config_of, lengths):
    assert measure_long_contexts(config_of(lengths)) == []
