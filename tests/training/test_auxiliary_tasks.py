"""Auxiliary tasks against loops over tokens."""

import pytest
import torch
import torch.nn.functional as F

from semtoken_hf.training.auxiliary_tasks import (
    ReconstructionHead,
    merged_tokens,
    reconstruction_loss,
    state_matching_loss,
)
from tests.fixtures.tiny import ragged_prompts, tiny_model

# Two rows, left- and right-padded; slots of 1 to 5 tokens, merged ones side by side and apart.
COLUMNS = torch.tensor(
    [
        [-1, -1, 2, 3, 3, 3, 4, 5, 5, 6, 6, 7],
        [0, 1, 1, 1, 1, 1, 2, 3, 4, 4, 5, -1],
    ]
)
SLOTS, WIDTH, VOCABULARY = 8, 6, 11


def by_loop(columns):
    """(row, token, place, is merged, follows a merged span) of every token that is no padding."""
    facts = []
    for b, row in enumerate(columns.tolist()):
        for t, column in enumerate(row):
            if column < 0:
                continue
            place = t - row.index(column)
            is_merged = row.count(column) > 1
            follows = t > 0 and row[t - 1] >= 0 and row[t - 1] != column and row.count(row[t - 1]) > 1
            facts.append((b, t, place, is_merged, follows and not is_merged))
    return facts


def real_columns():
    ids, mask = ragged_prompts()
    prompt = tiny_model(target_ratio=3.0).compress(ids, mask)
    first = prompt.inputs_embeds.shape[1] - prompt.kept_lengths
    return (prompt.span_ids + first[:, None]).where(prompt.span_ids >= 0, -1)


@pytest.mark.parametrize("columns", [COLUMNS, real_columns()], ids=["by hand", "planned"])
def test_merged_tokens(columns):
    is_merged, place = merged_tokens(columns)
    facts = by_loop(columns)
    assert any(merged for _, _, _, merged, _ in facts)
    for b, t, expected_place, merged, _ in facts:
        assert is_merged[b, t] == merged
        assert place[b, t] == expected_place
    assert not is_merged[columns < 0].any()


@pytest.fixture
def head():
    return ReconstructionHead(WIDTH, 4)


def test_reconstruction_against_a_loop(head):
    slots = torch.randn(2, SLOTS, WIDTH, requires_grad=True)
    vocabulary = torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    ids = torch.randint(0, VOCABULARY, COLUMNS.shape)
    ours = reconstruction_loss(head, slots, COLUMNS, ids, vocabulary)
    losses = []
    for b, t, place, is_merged, _ in by_loop(COLUMNS):
        if is_merged:
            logits = head(slots[b, COLUMNS[b, t]][None], torch.tensor([place]), vocabulary)
            losses.append(F.cross_entropy(logits, ids[b, t][None]))
    assert len(losses) == 14
    torch.testing.assert_close(ours, torch.stack(losses).mean())
    ours.backward()
    assert vocabulary.grad is None
    merged = torch.zeros(2, SLOTS, dtype=torch.bool)
    for b, t, _, is_merged, _ in by_loop(COLUMNS):
        merged[b, COLUMNS[b, t]] |= is_merged
    assert torch.equal(slots.grad.any(-1), merged)
    assert all(p.grad.any() for p in head.parameters())


def test_state_matching_against_a_loop():
    student = torch.randn(2, SLOTS, WIDTH, requires_grad=True)
    teacher = torch.randn(*COLUMNS.shape, WIDTH)
    ours = state_matching_loss(student, teacher, COLUMNS)
    pairs = [(b, t) for b, t, _, _, follows in by_loop(COLUMNS) if follows]
    assert pairs == [(0, 6), (0, 11), (1, 6), (1, 10)]
    error = sum(float((student[b, COLUMNS[b, t]] - teacher[b, t]).detach().square().sum()) for b, t in pairs)
    power = sum(float(teacher[b, t].square().sum()) for b, t in pairs)
    assert ours.item() == pytest.approx(error / power, rel=1e-5)
    ours.backward()
    touched = {(b, int(COLUMNS[b, t])) for b, t in pairs}
    assert {tuple(i) for i in student.grad.any(-1).nonzero().tolist()} == touched
