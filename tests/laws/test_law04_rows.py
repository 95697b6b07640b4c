"""Law 4: a row's plan, logits and tokens do not depend on its batch mates, on padding or on chunks."""

import functools

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from tests.fixtures.cached_rows import states_of_row
from tests.fixtures.tiny import BERT, WITH_WINDOWS, left_padded, ragged_prompts, random_ids, tiny_model

from .cases import CLOSE, Case, each_cell, model_of, outcome_of, plain_of, plain_outcome
from .code_paths import CODE_PATHS, coupled_draws

# The last row is too short to be compressed at all.
LENGTHS = (96, 70, 18, 11)
NEW_TOKENS = 6
SEARCHES = {
    "greedy": {},
    "beam 4": {"num_beams": 4},
    "beam 3 x 2": {"num_beams": 3, "num_return_sequences": 2},
}


@functools.cache
def tiny_model_of(attention, mode):
    return tiny_model(attn_implementation=attention, position_mode=mode)


@pytest.fixture(params=["eager", "sdpa"])
def attention(request):
    return request.param


@pytest.fixture(params=["original", "compact"])
def model(request, attention):
    return tiny_model_of(attention, request.param)


@pytest.fixture
def ragged():
    """The rows, each [1, n] without padding, and the same rows as one padded batch."""
    ids, mask = ragged_prompts(LENGTHS)
    return [row[-n:][None] for row, n in zip(ids, LENGTHS, strict=True)], ids, mask


def generate(model, ids, mask=None, **arguments):
    """No end of sequence, so that every row has all its steps."""
    mask = torch.ones_like(ids) if mask is None else mask
    arguments = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, **arguments}
    return model.generate(ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **arguments)


@pytest.mark.parametrize("family", WITH_WINDOWS)
def test_a_window_counts_padding_inside_a_row(family):
    """The limit that the chats above leave out is the plain model's own."""
    case, code_path = Case(family), CODE_PATHS["chat"]
    together = plain_outcome(case, "chat").by_row["logits"]
    ids = code_path.rows()[2][None]
    alone = code_path.run(plain_of(case), ids, torch.ones_like(ids)).by_row["logits"]
    assert (together[2] - alone[0]).abs().max() > 1e-3


def right_padded(rows):
    return tuple(pad_sequence(r, batch_first=True) for r in (rows, [torch.ones_like(row) for row in rows]))


def new_tokens(outputs, prompt):
    return outputs.sequences[:, prompt.shape[1] :]


def assert_same_values(ours, theirs, name):
    if ours.is_floating_point():
        # Gradients are sums over many tokens: as close as their largest entry allows.
        scale = theirs[theirs.isfinite()].abs().max().clamp(min=1) if "gradients" in name else 1
        torch.testing.assert_close(ours / scale, theirs / scale, **CLOSE, msg=lambda m: f"{name}: {m}")
    else:
        assert torch.equal(ours, theirs), name


def assert_same_slots(case, together, row, alone):
    """Lengths, keys and values of what one prompt put into the cache."""
    lengths = together.slot_lengths[row]
    if hasattr(alone, "slot_lengths"):
        mine = alone.slot_lengths[0]
        assert torch.equal(lengths[lengths > 0], mine[mine > 0])
    if case.is_sliding:
        return
    for ours, theirs in zip(states_of_row(together, row), states_of_row(alone, 0), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@each_cell(CODE_PATHS, everything=True)
def test_rows_are_those_of_single_prompts(case, code_path):
    """A batch behind padding, one row of it too short to be compressed, against its rows alone without padding."""
    name, code_path, model = code_path, CODE_PATHS[code_path], model_of(case)
    if case.family == "gpt2" and not code_path.compresses:
        pytest.skip("plain GPT-2 learns the positions of columns, padding included")

    def run(ids, mask):
        if not code_path.samples:
            return code_path.run(model, ids, mask)
        with coupled_draws(code_path.copies):
            return code_path.run(model, ids, mask)

    # A window counts columns, and padding inside a row is one, for the plain model as well.
    is_short = case.is_sliding and name == "chat"
    rows, sums = code_path.rows()[:1] if is_short else code_path.rows(), []
    together = run(*code_path.batch(rows)) if code_path.samples or is_short else outcome_of(case, name)
    for row, ids in enumerate(rows):
        alone = run(ids[None], torch.ones_like(ids[None]))
        for key, value in together.by_row.items():
            assert_same_values(value[row * code_path.copies : (row + 1) * code_path.copies], alone.by_row[key], key)
        for key, value in together.by_token.items():
            assert_same_values(value[row : row + 1, -len(ids) :], alone.by_token[key], key)
        sums.append(alone.sums)
        if hasattr(together.cache, "slot_lengths"):
            beams = len(together.cache.slot_lengths) // len(rows)
            assert_same_slots(case, together.cache, row * beams, alone.cache)
    for key, value in together.sums.items():
        assert_same_values(value, sum(part[key] for part in sums), key)


@pytest.mark.parametrize("chunk", [1, 7])
def test_chunked_prefill_of_beams(model, ragged, chunk):
    """Chunks are cut behind the plan: any size gives what one go gives."""
    _, ids, mask = ragged
    search = SEARCHES["beam 3 x 2"]
    at_once = generate(model, ids, mask, **search)
    chunked = generate(model, ids, mask, prefill_chunk_size=chunk, **search)
    assert torch.equal(at_once.sequences, chunked.sequences)
    for ours, theirs in zip(chunked.logits, at_once.logits, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    assert torch.equal(chunked.past_key_values.slot_lengths, at_once.past_key_values.slot_lengths)
    keys, expected = chunked.past_key_values.layers[1].keys, at_once.past_key_values.layers[1].keys
    real = (at_once.past_key_values.slot_lengths > 0)[:, None, :, None]
    torch.testing.assert_close(keys * real, expected * real, **CLOSE)


def test_chunks_bound_the_columns(model, ragged):
    _, ids, mask = ragged
    columns = []
    layer = model.model.layers[0]
    hook = layer.register_forward_pre_hook(lambda _, arguments: columns.append(arguments[0].shape[1]))
    generate(model, ids, mask, prefill_chunk_size=16, max_new_tokens=1, min_new_tokens=1)
    hook.remove()
    # 40 slots are kept of the longest row.
    assert columns == [16, 16, 8]


def test_rows_that_end_early(model, ragged):
    """Ends at different steps: finished rows are filled up and disturb nobody."""
    rows, ids, mask = ragged
    ends = {"eos_token_id": list(range(3, 60)), "min_new_tokens": 0, "max_new_tokens": 10}
    together = new_tokens(generate(model, ids, mask, **ends), ids)
    lengths = set()
    for row, prompt in enumerate(rows):
        alone = new_tokens(generate(model, prompt, **ends), prompt)[0]
        lengths.add(len(alone))
        assert torch.equal(together[row, : len(alone)], alone)
        assert (together[row, len(alone) :] == model.config.pad_token_id).all()
    assert len(lengths) > 1


@pytest.mark.parametrize("search", ["greedy", "beam 4"])
def test_order_of_rows(model, ragged, search):
    _, ids, mask = ragged
    order = torch.tensor([2, 0, 3, 1])
    outputs, mixed = (generate(model, ids[o], mask[o], **SEARCHES[search]) for o in (torch.arange(4), order))
    assert torch.equal(outputs.sequences[order], mixed.sequences)


@pytest.mark.parametrize("segmentation", ["boundary", "greedy", "sentence", "uniform"])
def test_side_of_padding(segmentation):
    """Left or right, `compress` gives the same slots, laid out on the left."""
    model = tiny_model(segmentation_mode=segmentation)
    rows = [random_ids(1, n, n)[0] for n in LENGTHS]
    ids, mask = left_padded(rows)
    left, right = model.compress(ids, mask), model.compress(*right_padded(rows))
    for name in ("inputs_embeds", "position_ids", "attention_mask", "slot_lengths", "kept_lengths", "budget_met"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name
    for row, n in enumerate(LENGTHS):
        assert torch.equal(left.span_ids[row, -n:], right.span_ids[row, :n])
        assert (right.span_ids[row, n:] == -1).all()


@pytest.mark.parametrize("fields", [{}, {"encoder_config": BERT, "encoder_window": 32}], ids=["static", "transformer"])
@pytest.mark.parametrize("target_ratio", [1.5, 2.4, 4.0])
def test_plans_of_a_batch(target_ratio, fields):
    model = tiny_model(**fields)
    ids, mask = ragged_prompts(LENGTHS)
    together = model.compress(ids, mask, target_ratio=target_ratio)
    for row, n in enumerate(LENGTHS):
        alone = model.compress(ids[row : row + 1, -n:], target_ratio=target_ratio)
        kept = int(alone.kept_lengths)
        assert torch.equal(together.span_ids[row, -n:], alone.span_ids[0])
        assert together.kept_lengths[row] == kept
        assert torch.equal(together.position_ids[row, -kept:], alone.position_ids[0])
        torch.testing.assert_close(together.inputs_embeds[row, -kept:], alone.inputs_embeds[0])


def test_right_padded_forward(model):
    """Scoring right-padded rows, as collators make them."""
    rows = [random_ids(1, n, n)[0] for n in (96, 70)]
    ids, mask = right_padded(rows)
    labels = torch.full_like(ids, -100)
    labels[:, 50:60] = ids[:, 50:60]
    together = model(ids, attention_mask=mask, labels=labels)
    for row, n in enumerate((96, 70)):
        alone = model(ids[row : row + 1, :n], labels=labels[row : row + 1, :n])
        torch.testing.assert_close(together.logits[row, :n], alone.logits[0], equal_nan=True, **CLOSE)
        assert together.logits[row, n:].isnan().all()
