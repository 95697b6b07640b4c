"""Law 8, over several calls: chats, turns in a batch, short turns, drafts."""

import copy

import pytest
import torch

from semtoken_hf import SemTokenCache
from tests.fixtures.tiny import left_padded, plain_twin, random_ids, tiny_model

from .cases import CLOSE, Case, model_of

STEPS = 5


@pytest.fixture(params=[("llama", "original"), ("llama", "compact"), ("gpt_neox", "original"), ("qwen3", "compact")])
def model(request):
    family, positions = request.param
    return model_of(Case(family, positions=positions))


def generate(model, ids, mask=None, **arguments):
    arguments = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, **arguments}
    return model.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **arguments)


def turn(length, seed):
    """A later turn: no BOS inside."""
    return random_ids(1, length + 1, seed)[:, 1:]


def by_hand(model, cache, ids, mask=None, steps=STEPS):
    """Greedy decoding with nothing but `forward`: the new tokens of this turn go in, its answer comes out."""
    answer, column = [], ids
    for _ in range(steps):
        with torch.no_grad():
            logits = model(column, attention_mask=mask, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        # As `min_new_tokens` does.
        logits[:, model.config.eos_token_id] = -torch.inf
        column = logits.argmax(-1, keepdim=True)
        mask = None if mask is None else torch.cat([mask, torch.ones_like(column)], dim=1)
        answer.append(column)
    return torch.cat(answer, dim=1)


def keys_and_values(cache):
    return [t for layer in cache.layers for t in (layer.keys, layer.values)]


def test_chat(model):
    """Each turn compresses its own tokens and leaves what is held bit-identical; `forward` by hand agrees."""
    cache, manual = SemTokenCache(config=model.config), SemTokenCache(config=model.config)
    ids = torch.empty(1, 0, dtype=torch.long)
    for number, message in enumerate((random_ids(1, 90), turn(64, 1), turn(75, 2))):
        fresh = torch.cat([ids[:, -1:] if number else ids, message], dim=1)
        ids = torch.cat([ids, message], dim=1)
        held, held_slots = copy.deepcopy(keys_and_values(cache)) if number else [], cache.physical_length()
        before = cache.get_seq_length()
        assert fresh.shape[1] == ids.shape[1] - before
        ids = generate(model, ids, past_key_values=cache)

        for now, then in zip(keys_and_values(cache), held, strict=bool(number)):
            assert torch.equal(now[:, :, :held_slots], then)
        assert cache.get_seq_length() == ids.shape[1] - 1
        assert cache.original_lengths.tolist() == [ids.shape[1] - 1]
        new_slots = cache.slot_lengths[:, held_slots:]
        assert int(new_slots.sum()) == ids.shape[1] - 1 - before
        # ceil(n / 2.4) slots of the turn, and one for each answer token that was read.
        assert new_slots.shape[1] == -(-fresh.shape[1] * 10 // 24) + STEPS - 1

        assert torch.equal(by_hand(model, manual, fresh), ids[:, -STEPS:])
        assert torch.equal(manual.slot_lengths, cache.slot_lengths)
        for ours, theirs in zip(keys_and_values(manual), keys_and_values(cache), strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("lengths", [(64, 35), (40, 9), (3, 12)])
def test_chats_in_a_batch(model, lengths, chunk):
    """Rows whose turns differ in length are padded inside; each answers as it would alone."""
    first, first_mask = left_padded([random_ids(1, n, n)[0] for n in (90, 50)])
    second, second_mask = left_padded([turn(n, n)[0] for n in lengths])
    cache = SemTokenCache(config=model.config)
    ids = generate(model, first, first_mask, past_key_values=cache)
    mask = torch.cat([first_mask, torch.ones_like(ids[:, 90:]), second_mask], dim=1)
    ids = torch.cat([ids, second], dim=1)
    outputs = generate(model, ids, mask, past_key_values=cache, prefill_chunk_size=chunk)
    for row in range(2):
        real = mask[row].bool()
        alone = SemTokenCache(config=model.config)
        opening = generate(model, first[row : row + 1, first_mask[row].bool()], past_key_values=alone)
        assert torch.equal(ids[row, real][: opening.shape[1]], opening[0])
        expected = generate(model, ids[row : row + 1, real], past_key_values=alone)
        assert torch.equal(outputs[row, -STEPS:], expected[0, -STEPS:])
        assert cache.original_lengths[row] == alone.original_lengths[0]
        assert cache.compressed_lengths[row] == alone.compressed_lengths[0]


def test_first_tokens_are_those_of_the_row():
    """`num_sink_tokens` guards the start of the chat, not of each turn."""
    model = tiny_model(num_sink_tokens=12, segmentation_mode="uniform")
    cache = SemTokenCache(config=model.config)
    ids = torch.cat([generate(model, random_ids(1, 90), past_key_values=cache), turn(80, 1)], dim=1)
    held = cache.physical_length()
    generate(model, ids, past_key_values=cache)
    assert cache.slot_lengths[0, :12].tolist() == [1] * 12
    assert (cache.slot_lengths[0, held : held + 12] > 1).all()


def test_short_prompt_then_long_turn(model):
    """A cache that starts uncompressed takes merged slots later."""
    cache, manual = SemTokenCache(config=model.config), SemTokenCache(config=model.config)
    ids = generate(model, random_ids(1, 10), past_key_values=cache)
    assert not cache.is_compressed
    assert torch.equal(by_hand(model, manual, ids[:, :10]), ids[:, 10:])
    ids = torch.cat([ids, turn(80, 4)], dim=1)
    answer = generate(model, ids, past_key_values=cache)[:, -STEPS:]
    assert cache.is_compressed
    assert cache.original_lengths.tolist() == [ids.shape[1] + STEPS - 1]
    assert torch.equal(by_hand(model, manual, ids[:, 14:]), answer)


def test_uncompressed_decoding_by_hand_is_exact():
    """Law 1 on a SemTokenCache: no positions are given, so the model counts them."""
    model = tiny_model()
    ids = random_ids(1, 12)
    ours = by_hand(model, SemTokenCache(config=model.config), ids, steps=8)
    assert torch.equal(ours, plain_twin(model).generate(ids, max_new_tokens=8, min_new_tokens=8)[:, 12:])


def test_compression_can_change_between_turns(model):
    """Off for one turn: its tokens keep a slot each, behind the merged ones."""
    cache = SemTokenCache(config=model.config)
    ids = torch.cat([generate(model, random_ids(1, 90), past_key_values=cache), turn(60, 1)], dim=1)
    held = cache.physical_length()
    generate(model, ids, past_key_values=cache, compression=False)
    assert (cache.slot_lengths[:, held:] == 1).all()
    assert cache.get_seq_length() == ids.shape[1] + STEPS - 1


def test_plan_from_outside(model):
    """It covers the tokens of the turn, or all so far."""
    cache = SemTokenCache(config=model.config)
    ids = random_ids(1, 90)
    for _ in range(2):
        held = cache.physical_length()
        pairs = torch.arange(ids.shape[1])[None] // 2
        ids = generate(model, ids, past_key_values=cache, span_ids=pairs, protected_mask=pairs == 25)
        # Behind what stays whole at the start, before what stays whole at the end.
        assert cache.slot_lengths[0, held + 3 : held + 23].tolist() == [2] * 20
        ids = torch.cat([ids, turn(60, 1)], dim=1)


def test_plan_from_outside_with_drafts(model):
    """Drafted tokens stand behind the plan and are no part of it."""
    ids = random_ids(1, 30).repeat(1, 3)
    arguments = {"span_ids": torch.arange(90)[None] // 2, "protected_mask": (ids > 250).long()}
    expected = generate(model, ids, max_new_tokens=9, **arguments)
    assert torch.equal(generate(model, ids, max_new_tokens=9, prompt_lookup_num_tokens=3, **arguments), expected)


def test_new_tokens_alone(model):
    """`generate` also takes just the new tokens, with the mask of all of them."""
    first, second = random_ids(1, 90), turn(64, 1)
    answers = []
    for alone in (False, True):
        cache = SemTokenCache(config=model.config)
        ids = torch.cat([generate(model, first, past_key_values=cache), second], dim=1)
        mask = torch.ones_like(ids)
        answers.append(generate(model, ids[:, 94:] if alone else ids, mask, past_key_values=cache)[:, -STEPS:])
    assert torch.equal(*answers)
