"""The packed objective: who sees whom, and that what is trained is what is used."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.distributions import Categorical
from torch.distributions import kl_divergence as kl_of

from semtoken_hf.training.packed_attention import use_packed_attention
from semtoken_hf.training.packed_objective import PackedDistillationModel, packed_states
from semtoken_hf.training.sliced_divergence import sliced_divergence
from semtoken_hf.training.trainable_parts import choose_trainable
from tests.fixtures.adapted import adapted_model
from tests.fixtures.tiny import BERT, random_ids, tiny_model

CHUNK, CHUNKS = 24, 4
LENGTH = CHUNK * CHUNKS
SPANS = torch.tensor([[4, 1, 3], [2, 8, 5]])


@pytest.fixture
def ids():
    return random_ids(2, LENGTH)


def packed(model, ids, spans=SPANS):
    use_packed_attention(model)
    with torch.no_grad():
        return packed_states(model, ids, spans)


def changed_columns(model, ids, token):
    """bool [n - c]: raw columns whose states change with a token of the first row."""
    other = ids.clone()
    other[0, token] = 3 + (other[0, token] + 1) % 200
    before, after = packed(model, ids), packed(model, other)
    assert torch.equal(before[1], after[1])
    return (before[0] != after[0]).any(-1)


def test_a_token_changes_its_own_chunk_behind_it_and_later_chunks(ids):
    """Nothing before: not through a slot, and not through an encoder that reads whole windows."""
    model = adapted_model(encoder_config=dict(BERT), encoder_window=48, encoder_overlap=8, merger_base="mean")
    for token in (CHUNK, CHUNK + 7, 3 * CHUNK - 1, LENGTH - 1):
        changed = changed_columns(model, ids, token)
        assert not changed[: token - CHUNK].any()
        assert changed[token - CHUNK :].all()


def test_later_chunks_see_slots_and_no_raw_token(ids):
    """The first of two tokens is no representative: with slots alone, nobody behind its chunk knows it."""
    spans = torch.tensor([[2, 2, 2], [2, 2, 2]])
    model = tiny_model(merge_mode="representative", num_sink_tokens=0)
    other = ids.clone()
    token = CHUNK + 4
    other[0, token] = 3 + (other[0, token] + 1) % 200
    changed = (packed(model, ids, spans)[0] != packed(model, other, spans)[0]).any(-1)
    assert changed.nonzero().flatten().tolist() == list(range(4, CHUNK))


@pytest.mark.parametrize(("family", "mode"), [("llama", "compact"), ("gpt_neox", "original"), ("qwen3", "original")])
def test_the_last_chunk_is_what_the_model_itself_says_behind_that_plan(ids, family, mode):
    fields = {"recent_window": 0, "min_prompt_length": 0, "fingerprint_radius": 0, "position_mode": mode}
    if family == "llama":  # with an adapter on top
        model = adapted_model(merger_base="mean", **fields)
    else:
        model = tiny_model(family=family, merge_mode="learned", merger_base="mean", merger_rank=4, **fields)
        torch.nn.init.normal_(model.base_model.learned_merger.out_proj, std=0.3)
    logits = model.get_output_embeddings()(packed(model, ids)[:, -CHUNK:])
    for row, spans in enumerate(SPANS.tolist()):
        opens = [i % s == 0 for s in spans for i in range(CHUNK)] + [True] * CHUNK
        plan = torch.tensor(opens).cumsum(0)[None] - 1
        with torch.no_grad():
            ours = model(ids[row : row + 1], span_ids=plan, logits_to_keep=CHUNK)
        assert ours.compressed_lengths.item() < LENGTH
        torch.testing.assert_close(logits[row : row + 1], ours.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_whole_chunks_cost_nothing_before_training(ids, trainable):
    student = tiny_model(merge_mode="learned", merger_rank=4)
    teacher = copy.deepcopy(student).requires_grad_(False) if trainable == "full" else None
    choose_trainable(student, trainable, 2, 4)
    module = PackedDistillationModel(student, teacher, 0.0).train()
    assert module(ids, torch.ones_like(SPANS))["kl"] < 1e-6
    losses = module(ids, SPANS)
    assert losses["kl"] > 1e-3
    losses["loss"].backward()
    assert student.base_model.learned_merger.out_proj.grad.any()


def test_the_loss_by_hand(ids):
    """Every raw token of the chunks behind the first is a target."""
    model = tiny_model(merge_mode="learned", merger_rank=4)
    choose_trainable(model, "merger", 2, 4)
    losses = PackedDistillationModel(model, None, cross_entropy_weight=0.5)(ids, SPANS)
    read = Categorical(logits=model.lm_head(packed(model, ids)))
    whole = Categorical(logits=model(ids, compression=False).logits[:, CHUNK:])
    kl = kl_of(whole, read).mean()
    cross_entropy = -Categorical(logits=read.logits[:, :-1]).log_prob(ids[:, CHUNK + 1 :]).mean()
    torch.testing.assert_close(losses["kl"], kl.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["loss"].detach(), (kl + 0.5 * cross_entropy).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["granite", "gemma3_text"])
def test_a_head_that_is_more_than_a_matrix_is_refused(family):
    with pytest.raises(ValueError, match="objective='window'"):
        PackedDistillationModel(tiny_model(family=family, merge_mode="learned", merger_rank=4), None, 0.0)


def test_slices_change_neither_the_divergence_nor_its_gradients(monkeypatch):
    monkeypatch.setattr("semtoken_hf.training.sliced_divergence.ROWS_PER_SLICE", 4)
    states, head, taught = torch.randn(10, 6), torch.randn(9, 6), torch.randn(10, 6)
    results = []
    for is_sliced in (True, False):
        inputs = [states.clone().requires_grad_(), head.clone().requires_grad_()]
        if is_sliced:
            kl = sliced_divergence(inputs[0], inputs[1], taught, head)
        else:
            kl = kl_of(Categorical(logits=taught @ head.T), Categorical(logits=inputs[0] @ inputs[1].T)).mean()
        results.append([kl.detach(), *torch.autograd.grad(3 * kl, inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
