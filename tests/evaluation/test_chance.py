import torch

from semtoken_hf import granularity
from semtoken_hf.evaluation.chance import chance_instead_of_entropy
from semtoken_hf.span_planner import plan_spans
from tests.fixtures.tiny import random_ids, tiny_model


def plan(model):
    return plan_spans(model.config, model.model.semantic_encoder, random_ids(1, 200)).span_ids


def test_chance_keeps_as_many_tokens_but_others_and_is_gone_afterwards():
    model = tiny_model(segmentation_mode="greedy", similarity_threshold=-1.0)
    usual, entropy = plan(model), granularity.span_entropy
    with chance_instead_of_entropy(0):
        first = plan(model)
    with chance_instead_of_entropy(0):
        assert torch.equal(plan(model), first)
    with chance_instead_of_entropy(1):
        assert not torch.equal(plan(model), first)
    assert not torch.equal(first, usual)
    assert abs(first.max() - usual.max()) < model.config.max_span_length
    assert granularity.span_entropy is entropy


def test_nothing_changes_if_it_is_not_active():
    entropy = granularity.span_entropy
    with chance_instead_of_entropy(0, active=False):
        assert granularity.span_entropy is entropy
