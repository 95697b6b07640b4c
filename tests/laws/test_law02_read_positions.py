"""Law 2: a token whose logits or loss somebody asks for keeps its own slot, and shapes are Transformers' shapes."""

import pytest
import torch
import torch.nn.functional as F

from tests.fixtures.tiny import VOCAB_SIZE, plain_twin, ragged_prompts, random_ids, tiny_model

from .cases import (
    CLOSE,
    NEEDS_2D_INDEX,
    RATIO,
    assert_identical,
    each_case,
    each_cell,
    outcome_of,
    plain_outcome,
    spread_cases,
)
from .code_paths import CODE_PATHS, read_by_labels
from .slots import Part, read_parts

LENGTHS = (120, 77)
KEPT = {
    "one": 1,
    "several": 6,
    "into the padding": 90,
    "shared index": torch.tensor([60, 3, 118, -1]),
    "index per row": torch.tensor([[5, 70, 119], [119, 50, 47]]),
    "mask": torch.rand(2, 120, generator=torch.Generator().manual_seed(0)) < 0.06,
}


def read_positions(kept, tokens=120, rows=2):
    """bool [rows, tokens], said a second time with plain indexing."""
    read = torch.zeros(rows, tokens, dtype=torch.bool)
    if isinstance(kept, int):
        read[:, -kept:] = True
    elif kept.dtype == torch.bool:
        read |= kept
    elif kept.ndim == 1:
        read[:, kept] = True
    else:
        for row, index in zip(read, kept, strict=True):
            row[index] = True
    return read


def labels_of(ids, mask, spans=((46, 58), (85, 90), (110, 120))):
    """Labels on a few parts of the rows; padding is never scored."""
    labels = torch.full_like(ids, -100)
    for start, end in spans:
        labels[:, start:end] = ids[:, start:end]
    return labels.masked_fill(mask == 0, -100)


def reference_logits(model, ids, mask, read):
    """Logits [B, T, V] of every token's slot, by running the plain model over the slots that `compress` returns."""
    prompt = model.compress(ids, mask, read_mask=read)
    plain = plain_twin(model)
    slots = plain(
        inputs_embeds=prompt.inputs_embeds,
        position_ids=prompt.position_ids,
        attention_mask=prompt.attention_mask,
        use_cache=False,
    ).logits
    columns = prompt.inputs_embeds.shape[1] - prompt.kept_lengths[:, None] + prompt.span_ids
    return slots.gather(1, columns.clamp(min=0)[..., None].expand(-1, -1, VOCAB_SIZE))


def own_slot(span_ids):
    """bool [B, T]: whether no other token shares the token's slot."""
    return torch.stack([(row[:, None] == row).sum(1) == 1 for row in span_ids])


@each_case(spread_cases())
def test_all_logits_merge_nothing(case):
    assert_identical(outcome_of(case, "all logits"), plain_outcome(case, "all logits"))


@each_cell(["kept logits", "labels"], everything=True)
def test_what_is_read_is_a_slot_of_its_own(case, code_path):
    """Its logits are those of the plain model over the slots; nobody else's can be read."""
    outcome, (ids, mask) = outcome_of(case, code_path), CODE_PATHS[code_path].batch()
    real, span_ids = mask.bool(), outcome.others["span_ids"]
    read = read_by_labels(ids, mask) if code_path == "labels" else read_positions(3, ids.shape[1], len(ids))
    assert own_slot(span_ids)[read].all()
    assert (span_ids.amax(1)[:2] < real.sum(1)[:2] - 5).all()
    if code_path == "labels":
        logits = outcome.others["raw"]
        assert logits[read].isfinite().all()
        assert logits[~read].isnan().all()
    for row, row_ids in enumerate(CODE_PATHS[code_path].rows()):
        mine = read[row, real[row]]
        slots, lengths = read_parts(case, [Part(row_ids, RATIO, mine)])
        assert torch.equal(span_ids[row, real[row]].bincount(), lengths)
        expected = slots[lengths.cumsum(0).unsqueeze(1).eq(mine.nonzero()[:, 0] + 1).nonzero()[:, 0]]
        got = logits[row, read[row]] if code_path == "labels" else outcome.by_row["logits"][row]
        torch.testing.assert_close(got, expected, **CLOSE)


def test_labels_on_everything_merge_nothing():
    model = tiny_model()
    ids = random_ids(2, 120)
    ours, theirs = model(ids, labels=ids), plain_twin(model)(ids, labels=ids)
    assert torch.equal(ours.loss, theirs.loss)
    assert torch.equal(ours.logits, theirs.logits)


# Without `recent_window`, nothing but the reading itself keeps a read token whole.
@pytest.mark.parametrize("fields", [{}, {"position_mode": "compact"}, {"recent_window": 0}], ids=str)
@pytest.mark.parametrize(
    "kept", [pytest.param(k, marks=NEEDS_2D_INDEX) if k in ("index per row", "mask") else k for k in KEPT]
)
def test_logits_to_keep(kept, fields):
    model, kept = tiny_model(**fields), KEPT[kept]
    ids, mask = ragged_prompts(LENGTHS)
    read = read_positions(kept)
    outputs = model(ids, attention_mask=mask, logits_to_keep=kept)

    assert (outputs.compressed_lengths < torch.tensor(LENGTHS)).any()
    real = mask.bool()
    assert own_slot(outputs.span_ids)[read & real].all()

    # Padding that was asked for has the logits of no state.
    every = reference_logits(model, ids, mask, read).masked_fill(~real[..., None], 0)
    if isinstance(kept, int):
        expected = every[:, -kept:]
    elif kept.ndim == 2 and kept.dtype == torch.long:
        expected = torch.stack([row[index] for row, index in zip(every, kept, strict=True)])
    else:
        expected = every[kept] if kept.ndim == 2 else every[:, kept]
    assert outputs.logits.shape == expected.shape
    torch.testing.assert_close(outputs.logits, expected, atol=2e-5, rtol=1e-5)


def test_what_multiplies_padding_by_zero_gets_a_number():
    """Prompts are padded on the left and completions on the right, as trainers of policies do."""
    model = tiny_model().train()
    rows = [(random_ids(1, n, seed=n)[0], random_ids(1, c, seed=c)[0]) for n, c in ((90, 12), (61, 5))]
    ids, mask = torch.zeros(2, 102, dtype=torch.long), torch.zeros(2, 102, dtype=torch.long)
    for row, (prompt, completion) in enumerate(rows):
        part = slice(90 - len(prompt), 90 + len(completion))
        ids[row, part], mask[row, part] = torch.cat([prompt, completion]), 1
    outputs = model(ids, attention_mask=mask, logits_to_keep=13)
    assert (outputs.compressed_lengths < torch.tensor([60, 45])).all()
    logp = outputs.logits[:, :-1].log_softmax(-1).gather(2, ids[:, -12:, None])[..., 0]
    (logp * mask[:, -12:]).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    for row, (prompt, completion) in enumerate(rows):
        alone = model(torch.cat([prompt, completion])[None], logits_to_keep=len(completion) + 1).logits[0, :-1]
        expected = alone.log_softmax(-1).gather(1, completion[:, None])[:, 0]
        torch.testing.assert_close(logp[row, : len(completion)], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("recent_window", [0, 4])
@pytest.mark.parametrize("segmentation", ["boundary", "greedy", "sentence", "uniform"])
def test_labels(segmentation, recent_window):
    model = tiny_model(segmentation_mode=segmentation, recent_window=recent_window)
    ids, mask = ragged_prompts(LENGTHS)
    labels = labels_of(ids, mask)
    read = F.pad(labels[:, 1:] != -100, (0, 1))
    outputs = model(ids, attention_mask=mask, labels=labels)

    assert (outputs.compressed_lengths < torch.tensor(LENGTHS)).all()
    assert own_slot(outputs.span_ids)[read].all()
    assert outputs.logits.shape == (2, 120, VOCAB_SIZE)
    assert outputs.logits[read].isfinite().all()
    assert outputs.logits[~read].isnan().all()
    expected = reference_logits(model, ids, mask, read)
    torch.testing.assert_close(outputs.logits[read], expected[read], atol=2e-5, rtol=1e-5)

    targets = labels[:, 1:][read[:, :-1]]
    torch.testing.assert_close(outputs.loss, F.cross_entropy(expected[read], targets), atol=1e-5, rtol=1e-5)
    summed = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=torch.tensor(90)).loss
    torch.testing.assert_close(summed, F.cross_entropy(expected[read], targets, reduction="sum") / 90)


def test_label_on_the_first_token_after_padding():
    """Nothing but padding stands before it: it is not scored, and the padding's logits stay unreadable."""
    model = tiny_model()
    ids, mask = ragged_prompts(LENGTHS)
    labels = labels_of(ids, mask)
    expected = model(ids, attention_mask=mask, labels=labels)
    labels[1, 43] = ids[1, 43]
    outputs = model(ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(outputs.loss, expected.loss)
    assert outputs.logits[mask == 0].isnan().all()


@pytest.mark.parametrize("kept", [8, torch.arange(112, 120)], ids=["count", "index"])
def test_labels_of_kept_logits(kept):
    """As in Transformers, labels then stand for the kept positions alone."""
    model = tiny_model()
    ids, mask = ragged_prompts(LENGTHS)
    labels = ids[:, -8:]
    outputs = model(ids, attention_mask=mask, labels=labels, logits_to_keep=kept)
    assert outputs.logits.shape == (2, 8, VOCAB_SIZE)
    assert (outputs.compressed_lengths < torch.tensor(LENGTHS)).all()
    expected = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(outputs.loss, expected)


def test_labels_of_another_shape():
    ids = random_ids(2, 60)
    with pytest.raises(ValueError, match=r"`labels` must have the shape \(2, 60\)"):
        tiny_model()(ids, labels=ids[:, 1:])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(checkpointing):
    """They pass through merged slots to every token, and never reach the encoder."""
    model = tiny_model().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    # Every id once, so that each row of the embedding belongs to one token.
    ids = 3 + torch.randperm(120, generator=torch.Generator().manual_seed(1))[None]
    labels = labels_of(ids, torch.ones_like(ids))
    outputs = model(ids, labels=labels)
    outputs.loss.backward()

    merged = ~own_slot(outputs.span_ids)[0]
    assert merged.sum() > 30
    gradient = model.get_input_embeddings().weight.grad
    # The label of the last position predicts nothing, so nothing depends on the last token itself.
    assert (gradient[ids[0, :-1]].abs().sum(1) > 0).all()
    assert gradient[3 + 120 :].abs().sum() == 0
    for name, parameter in model.named_parameters():
        if "semantic_encoder" in name:
            assert parameter.grad is None
        else:
            assert parameter.grad.isfinite().all()
    # Tokens of one slot enter it as a mean: they share one gradient.
    first, second = merged.nonzero()[:2, 0]
    torch.testing.assert_close(gradient[ids[0, first]], gradient[ids[0, second]])
