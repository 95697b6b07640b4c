"""`model.compress`: the compression stage as its users see it."""

import dataclasses

import pytest
import torch

from semtoken_hf import CompressedPrompt
from tests.fixtures.tiny import LLAMA, ragged_prompts, random_ids, tiny_model

LENGTHS = (96, 70, 41, 18, 9)
HIDDEN = LLAMA["hidden_size"]


@pytest.fixture(scope="module", params=["boundary", "greedy", "sentence", "uniform"])
def model(request):
    return tiny_model(segmentation_mode=request.param)


@pytest.fixture
def ragged():
    return ragged_prompts(LENGTHS)


def columns_of(prompt):
    """int64 [B, T], as the docstring counts them; padding points before the first slot."""
    return prompt.inputs_embeds.shape[1] - prompt.kept_lengths[:, None] + prompt.span_ids


def members(prompt, row, column):
    """Token indices of a slot."""
    return (columns_of(prompt)[row] == column).logical_and(prompt.span_ids[row] >= 0).nonzero()[:, 0]


def slots(prompt):
    """(row, column, token indices) of every slot."""
    for row, column in (prompt.slot_lengths > 0).nonzero().tolist():
        yield row, column, members(prompt, row, column)


def assert_same(ours, theirs):
    for field in dataclasses.fields(CompressedPrompt):
        if field.name == "origin":
            continue
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes(ragged, dtype):
    model = tiny_model(dtype=dtype)
    ids, mask = ragged
    prompt = model.compress(ids, mask)
    width = int(prompt.kept_lengths.max())
    shapes = {
        "inputs_embeds": ((5, width, HIDDEN), dtype),
        "position_ids": ((5, width), torch.int64),
        "attention_mask": ((5, width), torch.int64),
        "slot_lengths": ((5, width), torch.int64),
        "span_ids": ((5, 96), torch.int64),
        "original_lengths": ((5,), torch.int64),
        "kept_lengths": ((5,), torch.int64),
        "budgets": ((5,), torch.int64),
        "budget_met": ((5,), torch.bool),
    }
    others = {"is_merged", "is_padded", "slot_counts", "origin"}
    assert {field.name for field in dataclasses.fields(prompt)} == {*shapes, *others}
    for name, (shape, kind) in shapes.items():
        value = getattr(prompt, name)
        assert (tuple(value.shape), value.dtype) == (shape, kind), name
    assert prompt.is_merged is True
    assert prompt.is_padded is True


def test_layout(model, ragged):
    ids, mask = ragged
    prompt = model.compress(ids, mask)
    width = prompt.inputs_embeds.shape[1]
    assert prompt.original_lengths.tolist() == list(LENGTHS)
    assert prompt.kept_lengths.tolist() == [40, 30, 18, 8, 9]
    left_padded = torch.arange(width) >= width - prompt.kept_lengths[:, None]
    assert torch.equal(prompt.attention_mask, left_padded.long())
    assert torch.equal(prompt.slot_lengths > 0, left_padded)
    assert torch.equal(prompt.slot_lengths.sum(1), prompt.original_lengths)
    for name in ("inputs_embeds", "position_ids", "slot_lengths"):
        assert getattr(prompt, name)[~left_padded].eq(0).all(), name
    assert torch.equal(prompt.span_ids == -1, mask == 0)
    counted = torch.zeros_like(prompt.slot_lengths)
    for row, column, tokens in slots(prompt):
        counted[row, column] = len(tokens)
        assert len(tokens) == 1 or tokens.diff().eq(1).all()
    assert torch.equal(counted, prompt.slot_lengths)
    assert prompt.slot_lengths.max() <= model.config.max_span_length


@pytest.mark.parametrize("mode", ["original", "compact"])
def test_mean(model, ragged, mode):
    ids, mask = ragged
    prompt = model.compress(ids, mask, position_mode=mode)
    embeddings = model.get_input_embeddings()(ids)
    place = mask.cumsum(1) - 1
    for row, column, tokens in slots(prompt):
        expected = embeddings[row, tokens].mean(0)
        torch.testing.assert_close(prompt.inputs_embeds[row, column], expected)
        position = prompt.span_ids[row, tokens[0]] if mode == "compact" else place[row, tokens[-1]]
        assert prompt.position_ids[row, column] == position


def test_representative(ragged):
    """The token nearest the mean of its span's fingerprints stands for the span, at its own position."""
    model = tiny_model(merge_mode="representative", fingerprint_radius=0)
    ids, mask = ragged
    prompt = model.compress(ids, mask)
    states = torch.nn.functional.normalize(model.model.semantic_encoder.encoder.get_input_embeddings()(ids), dim=-1)
    place, embeddings = mask.cumsum(1) - 1, model.get_input_embeddings()(ids)
    inner = 0
    for row, column, tokens in slots(prompt):
        anchor = tokens[place[row, tokens] == prompt.position_ids[row, column]]
        assert torch.equal(prompt.inputs_embeds[row, column], embeddings[row, anchor[0]])
        nearness = states[row, tokens] @ states[row, tokens].mean(0)
        assert nearness[tokens == anchor] >= nearness.max() - 1e-6
        inner += int(len(tokens) > 2 and anchor != tokens[-1])
    assert inner > 10


def test_representative_of_two_tokens(ragged):
    """Both are equally near their mean: a tie, and ties go to the later token, whatever the rounding."""
    prompt = tiny_model(merge_mode="representative").compress(*ragged)
    last = torch.where(prompt.slot_lengths > 0, prompt.slot_lengths.cumsum(1) - 1, 0)
    pairs = prompt.slot_lengths == 2
    assert pairs.sum() > 5
    assert torch.equal(prompt.position_ids[pairs], last[pairs])


@pytest.mark.parametrize("short", ["prompt", "ratio"])
def test_nothing_merges(short):
    model, ids = tiny_model(), random_ids(2, 10 if short == "prompt" else 96)
    prompt = model.compress(ids, target_ratio=None if short == "prompt" else 1)
    length = ids.shape[1]
    assert (prompt.is_merged, prompt.is_padded) == (False, False)
    assert torch.equal(prompt.inputs_embeds, model.get_input_embeddings()(ids))
    for name in ("position_ids", "span_ids"):
        assert torch.equal(getattr(prompt, name), torch.arange(length).expand(2, -1)), name
    assert (prompt.slot_lengths == 1).all()
    assert prompt.budget_met.all()


def test_a_mask_of_floating_point_is_one_of_ones_and_zeros(model):
    ids, mask = ragged_prompts([40, 64])
    expected = model.compress(ids, attention_mask=mask)
    assert torch.equal(model.compress(ids, attention_mask=mask.float()).span_ids, expected.span_ids)
    with pytest.raises(ValueError, match="attention_mask"):
        model.compress(ids, attention_mask=(mask == 0) * -1e9)


def test_given_positions():
    model, ids = tiny_model(), random_ids(2, 96)
    counted = model.compress(ids)
    moved = model.compress(ids, position_ids=torch.arange(96)[None] * 2 + 5)
    assert torch.equal(moved.position_ids, counted.position_ids * 2 + 5)
    compact = model.compress(ids, position_ids=torch.arange(96)[None] * 2 + 5, position_mode="compact")
    assert torch.equal(compact.position_ids, torch.arange(40).expand(2, -1))


def test_given_plan(model, ragged):
    ids, mask = ragged
    own = model.compress(ids, mask)
    assert_same(model.compress(ids, mask, span_ids=own.span_ids), own)
    # Slots of three tokens; what is protected or read is taken out of them.
    place = mask.cumsum(1) - 1
    span_ids = (place // 3).masked_fill(mask == 0, -1)
    given = model.compress(ids, mask, span_ids=span_ids.to(torch.int32))
    inside = given.slot_lengths[0, model.config.num_sink_tokens + 1 : -model.config.recent_window - 1]
    assert (inside == 3).all()
    assert (given.slot_lengths[0, -model.config.recent_window :] == 1).all()
    assert torch.equal(given.slot_lengths.sum(1), own.original_lengths)


def test_every_merged_slot_of_a_ready_plan_gets_its_residual() -> None:
    """A plan from elsewhere may merge in more places than spans as long as the cap would."""
    fields = {"segmentation_mode": "sentence", "max_span_length": 16, "merger_base": "representative"}
    model, ids = tiny_model(merge_mode="learned", **fields), random_ids(2, 96)
    pairs = {"span_ids": torch.arange(96).expand(2, -1) // 2}
    with torch.no_grad():
        bare = model.compress(ids, **pairs).inputs_embeds
        model.model.learned_merger.out_proj.normal_()
        prompt = model.compress(ids, **pairs)
    assert int((prompt.slot_lengths > 1).sum()) > 2 * 96 // model.config.max_span_length
    assert torch.equal((prompt.inputs_embeds != bare).any(-1), prompt.slot_lengths > 1)
