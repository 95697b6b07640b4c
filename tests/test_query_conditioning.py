"""The query-conditioned budget: what is like the question stays fine, and nothing else changes."""

import pytest
import torch
import torch.nn.functional as F

from semtoken_hf.query_conditioning import query_similarity
from semtoken_hf.span_clustering import Spans
from semtoken_hf.span_planner import plan_spans
from tests.fixtures.layouts import trimmed_layout
from tests.fixtures.tiny import random_ids, tiny_config, tiny_model

GREEDY = {"segmentation_mode": "greedy", "similarity_threshold": -1.0, "keep_last": 8}


def plan(model, ids, **call):
    return plan_spans(model.config, model.model.semantic_encoder, ids, **call)


def layout_of(lengths):
    valid = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return trimmed_layout(valid, torch.zeros_like(valid), torch.zeros_like(valid), 0, 0, 0)


def test_similarity_is_the_cosine_with_the_mean_of_the_question_in_deviations():
    h = F.normalize(torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    query = torch.arange(40) >= 36
    spans = Spans.from_starts((torch.arange(40) % 4 == 0) | (torch.arange(40) >= 36))
    similarity = query_similarity(h, spans, layout_of([40]), query)
    cosine = torch.stack([(s @ F.normalize(h[36:].mean(0), dim=0)).mean() for s in h.split([4] * 9 + [1] * 4)])
    merged = cosine[:9]
    expected = (cosine - merged.mean()) / merged.std(correction=0)
    expected[9:] = 0
    torch.testing.assert_close(similarity, expected)


def test_every_stretch_has_its_own_question():
    h = F.normalize(torch.randn(60, 6, generator=torch.Generator().manual_seed(1)), dim=1)
    starts, query = torch.arange(30) % 3 == 0, torch.arange(30) >= 27
    alone = query_similarity(h[30:], Spans.from_starts(starts), layout_of([30]), query)
    both = query_similarity(h, Spans.from_starts(starts.repeat(2)), layout_of([30, 30]), query.repeat(2))
    torch.testing.assert_close(both[10:], alone)
    none = query_similarity(h, Spans.from_starts(starts.repeat(2)), layout_of([30, 30]), torch.zeros(60).bool())
    assert torch.equal(none, torch.zeros(20))


def test_what_the_question_repeats_stays_whole():
    model, ids = tiny_model(**GREEDY), random_ids(1, 200)
    question = ids[:, -8:]
    ids[:, 90:98] = question
    model.config.query_weight = 0.0
    spread = plan(model, ids, target_ratio=3.0)
    model.config.query_weight = 8.0
    asked = plan(model, ids, target_ratio=3.0)
    assert asked.kept_lengths == spread.kept_lengths == 67
    lengths = asked.span_ids[0].unique(return_counts=True)[1][asked.span_ids[0]]
    assert (lengths[90:98] == 1).float().mean() >= 0.75
    before = spread.span_ids[0].unique(return_counts=True)[1][spread.span_ids[0]]
    assert (before[90:98] == 1).float().mean() < 0.75


def test_a_marked_question_stays_whole_and_counts_instead_of_the_tail():
    model, ids = tiny_model(**GREEDY, query_weight=8.0), random_ids(1, 200)
    ids[:, 40:48] = ids[:, 150:158]
    mask = torch.zeros_like(ids)
    mask[:, 150:158] = 1
    marked, tail = plan(model, ids, target_ratio=3.0, query_mask=mask), plan(model, ids, target_ratio=3.0)
    assert not torch.equal(marked.span_ids, tail.span_ids)
    lengths = marked.span_ids[0].unique(return_counts=True)[1][marked.span_ids[0]]
    assert (lengths[150:158] == 1).all()
    assert (lengths[40:48] == 1).float().mean() >= 0.75


def test_forward_and_generate_take_the_mask():
    model, ids = tiny_model(**GREEDY, query_weight=8.0), random_ids(1, 120)
    mask = torch.zeros_like(ids)
    mask[:, 60:70] = 1
    with torch.no_grad():
        outputs = model(ids, logits_to_keep=1, query_mask=mask)
    assert torch.equal(outputs.span_ids, plan(model, ids, query_mask=mask).span_ids)
    generated = model.generate(ids, query_mask=mask, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert generated.past_key_values.compressed_lengths == outputs.compressed_lengths + 2
    assert generated.sequences[0, 120] == outputs.logits[0, -1].argmax()


@pytest.mark.parametrize("mask", [torch.ones(1, 5), torch.full((1, 120), 0.5), "question"])
def test_a_wrong_mask_is_refused(mask):
    with pytest.raises(ValueError, match="query_mask"):
        tiny_model(**GREEDY).compress(random_ids(1, 120), query_mask=mask)


def test_only_the_greedy_mode_can_be_conditioned():
    with pytest.raises(ValueError, match="only the greedy mode"):
        tiny_config(segmentation_mode="boundary", query_weight=1.0)
