"""The cache of `semtoken_varlen`: memory of the rows' own slots, and every operation as on padded layers."""

import copy

import pytest
import torch
from transformers import DynamicCache

from semtoken_hf import SemTokenCache
from semtoken_hf.varlen_semtoken import VARLEN, RaggedLayer, RaggedRows, make_ragged, ranges
from tests.fixtures.cached_rows import states_of_row
from tests.fixtures.tiny import FEW, left_padded, ragged_prompts, random_ids, tiny_model

CLOSE = {"atol": 2e-5, "rtol": 1e-5}
LENGTHS, SLOTS = (96, 41, 10), [40, 18, 10]


@pytest.fixture(scope="module", params=[("llama", "original"), ("gpt_neox", "compact")])
def models(request):
    """The same weights over ragged and over padded layers."""
    family, positions = request.param
    return [tiny_model(family=family, position_mode=positions, attn_implementation=name) for name in (VARLEN, "sdpa")]


@pytest.fixture
def batch():
    return ragged_prompts(LENGTHS)


def prefill(model, ids, mask=None, cache=None, **arguments):
    cache = SemTokenCache(model.config) if cache is None else cache
    with torch.no_grad():
        return model(ids, attention_mask=mask, logits_to_keep=1, past_key_values=cache, **arguments).past_key_values


def decode(model, cache, token, steps=4):
    """Greedy tokens int64 [B, steps] and the logits of every step."""
    tokens, logits = [token], []
    for _ in range(steps):
        with torch.no_grad():
            logits.append(model(tokens[-1], past_key_values=cache, logits_to_keep=1).logits)
        tokens.append(logits[-1][:, -1].argmax(-1, keepdim=True))
    return torch.cat(tokens[:-1], 1), torch.cat(logits, 1)


def assert_same_cache(ours, theirs):
    """Books and states of a ragged and a padded cache."""
    assert ours.ragged_rows is not None
    assert theirs.ragged_rows is None
    assert torch.equal(ours.slot_lengths, theirs.slot_lengths)
    for name in ("original_lengths", "compressed_lengths", "compressed_rows"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert ours.get_seq_length() == theirs.get_seq_length()
    assert ours.ragged_rows.lengths == theirs.compressed_lengths.tolist()
    for row in range(len(ours.slot_lengths)):
        for a, b in zip(states_of_row(ours, row), states_of_row(theirs, row), strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


def assert_goes_on_alike(models, caches, rows=slice(None)):
    """The caches hold the same, and so they do after some steps."""
    assert_same_cache(*caches)
    token = torch.arange(7, 7 + len(caches[0].slot_lengths))[:, None]
    (ours, a), (theirs, b) = (decode(model, cache, token) for model, cache in zip(models, caches, strict=True))
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(a, b, **CLOSE)
    assert_same_cache(*caches)


def test_memory_of_a_skewed_batch():
    """The law, in bytes that somebody else counted: at most 1.1 times what the slots alone take."""
    model = tiny_model(attn_implementation=VARLEN, num_hidden_layers=1)
    ids, mask = left_padded([random_ids(1, n, n)[0] for n in (8192, 1024, 1024, 1023)])
    cache = prefill(model, ids, mask)
    layer, slots = cache.layers[0], int(cache.compressed_lengths.sum())
    assert slots == 3414 + 3 * 427
    a_slot = 2 * 2 * 16 * 4
    assert cache.memory_bytes() == layer.keys.nbytes + layer.values.nbytes
    assert slots * a_slot <= cache.memory_bytes() <= 1.1 * slots * a_slot
    # What padding would have cost.
    assert 4 * 3414 * a_slot > 2.5 * cache.memory_bytes()
    decode(model, cache, ids[:, -1:], steps=60)
    slots += 4 * 60
    assert cache.ragged_rows.lengths == [3474, 487, 487, 487]
    assert slots * a_slot <= cache.memory_bytes() <= 1.1 * slots * a_slot


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.reorder_cache(torch.tensor([1, 0, 2])),
        lambda cache: cache.reorder_cache(torch.tensor([0, 1, 2])),
        lambda cache: cache.reorder_cache(torch.tensor([2, 1, 1])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([2, 0])),
        lambda cache: cache.batch_select_indices(torch.tensor([False, True, True])),
        lambda cache: cache.crop(-3),
        lambda cache: cache.crop(-7),
        lambda cache: cache.crop(95),
        lambda cache: cache.crop(0),
    ],
    ids=[
        "reorder",
        "stay",
        "double",
        "repeat",
        "select",
        "select by mask",
        "crop",
        "crop more",
        "crop to",
        "crop none",
    ],
)
def test_operations(models, batch, change):
    caches = [prefill(model, *batch) for model in models]
    for model, cache in zip(models, caches, strict=True):
        decode(model, cache, batch[0][:, -1:])
        change(cache)
    assert_goes_on_alike(models, caches)


def test_crop_of_a_turn_with_padding(models, batch):
    """Rows lose what they have of the columns."""
    turn, hidden = ragged_prompts((6, 3, 1), seed=5)
    caches = []
    for model in models:
        cache = prefill(model, *batch)
        prefill(model, turn, torch.cat([batch[1], hidden], 1), cache)
        caches.append(cache)
    assert caches[0].ragged_rows.lengths == [46, 21, 11]
    for cache in caches:
        cache.crop(-4)
    assert caches[0].ragged_rows.lengths == [42, 18, 10]
    assert_goes_on_alike(models, caches)


def test_crop_over_what_was_left_out(models, batch):
    caches = [prefill(model, *batch) for model in models]
    for model, cache in zip(models, caches, strict=True):
        decode(model, cache, batch[0][:, -1:])
        mask = torch.nn.functional.pad(batch[1], (0, 4), value=1)
        mask[1, -3:] = 0
        cache.drop_masked(mask)
        cache.crop(-2)
    assert caches[0].ragged_rows.lengths == [42, 19, 12]
    assert_goes_on_alike(models, caches)


def test_crop_refuses_merged_slots(models, batch):
    cache = prefill(models[0], *batch)
    before = copy.deepcopy(cache)
    for count in (-30, -1000):
        with pytest.raises(ValueError, match="merged slots"):
            cache.crop(count)
    assert cache.ragged_rows.lengths == before.ragged_rows.lengths == SLOTS
    assert torch.equal(cache.slot_lengths, before.slot_lengths)


@pytest.mark.parametrize("merged", [True, False])
def test_what_fills_up_a_finished_row(models, batch, merged):
    """The mask of the next turn hides it, and it leaves the storage."""
    turn, hidden = ragged_prompts((60, 33, 20) if merged else (6, 3, 5), seed=5)
    caches = []
    for model in models:
        cache = prefill(model, *batch)
        decode(model, cache, batch[0][:, -1:])
        filled = torch.ones(3, 4, dtype=torch.long)
        # One in the middle, too: what is kept behind it moves up.
        filled[0, 1] = filled[1, 1:] = filled[2, 3:] = 0
        prefill(model, turn, torch.cat([batch[1], filled, hidden], 1), cache)
        caches.append(cache)
    if not merged:
        assert caches[0].ragged_rows.lengths == [40 + 3 + 6, 18 + 1 + 3, 10 + 3 + 5]
    assert_goes_on_alike(models, caches)


@pytest.mark.parametrize("chunk", [None, 5])
def test_turns(models, batch, chunk):
    """Merged and plain turns, with and without padding, in chunks."""
    caches, masks = [SemTokenCache(model.config) for model in models], [torch.empty(3, 0, dtype=torch.long)] * 2
    turns = [batch, ragged_prompts((50, 30, 40), seed=3), ragged_prompts((7, 7, 7), seed=4), ragged_prompts((3, 2, 5))]
    for ids, new in turns:
        for i, (model, cache) in enumerate(zip(models, caches, strict=True)):
            masks[i] = torch.cat([masks[i], new], 1)
            prefill(model, ids, masks[i], cache, prefill_chunk_size=chunk)
        assert_same_cache(*caches)
    assert_goes_on_alike(models, caches)


@pytest.mark.parametrize("hidden", [0, 3])
def test_a_single_row_with_a_mask_in_chunks(models, hidden):
    """A turn in which nothing merges: the states of its last chunk are not all that has to be laid out."""
    mask, logits = torch.ones(1, 118, dtype=torch.long), []
    mask[:, 96 : 96 + hidden] = 0
    caches = [SemTokenCache(model.config) for model in models]
    for model, cache in zip(models, caches, strict=True):
        prefill(model, random_ids(1, 96), mask[:, :96], cache)
        with torch.no_grad():
            turn = {"attention_mask": mask, "past_key_values": cache, "prefill_chunk_size": 5, "logits_to_keep": 2}
            logits.append(model(random_ids(1, 22, seed=1), protected_mask=mask, **turn).logits)
    torch.testing.assert_close(*logits, **CLOSE)
    assert_goes_on_alike(models, caches)


def test_held_slots_stay_bit_identical(models, batch):
    """However often the storage is laid out anew."""
    model = models[0]
    cache = prefill(model, *batch)
    held, sizes = [[t.clone() for t in states_of_row(cache, row)] for row in range(3)], set()
    for _ in range(70):
        decode(model, cache, batch[0][:, -1:], steps=1)
        sizes.add(cache.ragged_rows.size)
        assert {t.shape[0] for layer in cache.layers for t in (layer.keys, layer.values)} == {cache.ragged_rows.size}
    # Seventeen steps each, and not at every step.
    assert len(sizes) == 5
    for row, slots in enumerate(SLOTS):
        for now, then in zip(states_of_row(cache, row), held[row], strict=True):
            assert now.shape[1] == slots + 70
            assert torch.equal(now[:, :slots], then)


def test_reset_is_a_new_cache(models, batch):
    model = models[0]
    for cache in (SemTokenCache(model.config), SemTokenCache()):
        prefill(model, *batch, cache)
        cache.reset()
        assert (cache.get_seq_length(), cache.physical_length(), cache.memory_bytes()) == (0, 0, 0)
        assert cache.ragged_rows is cache.slot_lengths is None
        other = random_ids(2, 60, seed=5)
        ours = prefill(model, other, cache=cache)
        assert_same_rows(ours, prefill(model, other))
        # A short prompt is plain, to the last bit, as in a new one.
        cache.reset()
        short = random_ids(2, 9)
        assert type(prefill(model, short, cache=cache).layers[0]).__name__ == "DynamicLayer"
        assert_same_rows(cache, prefill(models[1], short))


def assert_same_rows(ours, theirs):
    assert torch.equal(ours.slot_lengths, theirs.slot_lengths)
    for row in range(len(ours.slot_lengths)):
        for a, b in zip(states_of_row(ours, row), states_of_row(theirs, row), strict=True):
            assert torch.equal(a, b)


def test_deepcopy(models, batch):
    model, token = models[0], batch[0][:, -1:]
    cache = prefill(model, *batch)
    twin = copy.deepcopy(cache)
    expected = decode(model, cache, token, steps=20)
    assert twin.ragged_rows.lengths == SLOTS
    assert twin.layers[0].rows is twin.layers[1].rows is twin.ragged_rows
    ours = decode(model, twin, token, steps=20)
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])


def test_layers_made_on_the_way(models, batch):
    """A cache without a configuration makes its layers at their first update."""
    caches = [prefill(model, *batch, SemTokenCache()) for model in models]
    assert_goes_on_alike(models, caches)


@pytest.mark.parametrize("first", ["short", "gradients"])
@pytest.mark.parametrize("family", FEW)
def test_padded_layers_become_ragged(family, first):
    """A cache that was filled before: a short prompt, left-padded, or a prompt read with gradients."""
    models = [tiny_model(family=family, attn_implementation=name) for name in (VARLEN, "sdpa")]
    ids, mask = ragged_prompts((12, 9, 5) if first == "short" else LENGTHS)
    turn, new = ragged_prompts((60, 33, 9), seed=8)
    caches = [SemTokenCache(model.config) for model in models]
    for model, cache in zip(models, caches, strict=True):
        with torch.set_grad_enabled(first == "gradients"):
            model(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
        decode(model, cache, ids[:, -1:], steps=2)
        assert cache.ragged_rows is None
        step = torch.ones(3, 2, dtype=torch.long)
        prefill(model, turn, torch.cat([mask, step, new], 1), cache)
    assert_goes_on_alike(models, caches)


def test_padded_layers_of_padding_alone_become_ragged(models):
    """A turn whose one token was cropped again: the layers hold a column that stands for nothing."""
    mask, caches = torch.cat([torch.zeros(1, 12), torch.ones(1, 60)], 1).long(), []
    for model in models:
        mask[:, 11] = 1
        cache = prefill(model, random_ids(1, 12), mask[:, :12])
        cache.crop(-1)
        mask[:, 11] = 0
        caches.append(prefill(model, random_ids(1, 60), mask[:, 1:], cache))
    assert_goes_on_alike(models, caches)


def test_after_inference_mode(models, batch):
    """Tensors of inference mode may not be written in place outside of it."""
    caches = []
    for model in models:
        with torch.inference_mode():
            caches.append(model(*batch, logits_to_keep=1, past_key_values=SemTokenCache(model.config)).past_key_values)
    assert caches[0].layers[0].keys.is_inference()
    assert_goes_on_alike(models, caches)


def test_masks_of_single_steps_are_for_the_next_turn(models, batch):
    """A step appends one token to every row: the host has to know without asking the device."""
    caches = []
    hidden = torch.tensor([[1], [0], [1]])
    turn = random_ids(3, 5, seed=2)
    for model in models:
        cache, mask = prefill(model, *batch), torch.cat([batch[1], hidden], 1)
        prefill(model, batch[0][:, -1:], mask, cache)
        if cache.ragged_rows is not None:
            assert cache.ragged_rows.lengths == [n + 1 for n in SLOTS]
        prefill(model, turn, torch.cat([mask, torch.ones_like(turn)], 1), cache)
        caches.append(cache)
    assert caches[0].ragged_rows.lengths == [SLOTS[0] + 6, SLOTS[1] + 5, SLOTS[2] + 6]
    assert_same_rows_closely(*caches)


def assert_same_rows_closely(ours, theirs):
    for row in range(len(ours.slot_lengths)):
        for a, b in zip(states_of_row(ours, row), states_of_row(theirs, row), strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


def test_other_layers_stay(models):
    """What cannot be ragged is left as it is."""
    sliding = SemTokenCache(tiny_model(family="mistral", sliding_window=8).config)
    layers = list(sliding.layers)
    assert not make_ragged(sliding, 2)
    assert sliding.layers == layers
    assert sliding.ragged_rows is None
    offloaded = SemTokenCache(models[0].config)
    offloaded.offloading = True
    assert not make_ragged(offloaded, 2)
    assert make_ragged(SemTokenCache.from_cache(DynamicCache(config=models[0].config)), 2)


@pytest.mark.parametrize(
    ("starts", "lengths"),
    [([3, 20, 7], [4, 2, 5]), ([5], [3]), ([9, 2], [1, 1]), ([9, 2, 4], [1, 0, 1]), ([9, 2, 4], [0, 3, 0]), ([], [])],
)
def test_ranges(starts, lengths):
    expected = [start + i for start, length in zip(starts, lengths, strict=True) for i in range(length)]
    ours = ranges(starts, lengths, torch.device("cpu"))
    assert ours.tolist() == expected
    assert ours.dtype == torch.int64


def test_layers_made_late_have_room_for_all():
    """A layer that comes into being behind a layout of its siblings takes the size of now."""
    rows = RaggedRows(2)
    layers = [RaggedLayer(rows), RaggedLayer(rows)]
    states = torch.randn(1, 3, 9, 4)
    rows.reserve(layers, [4, 5])
    rows.advance([4, 5])
    layers[0].update(states, states)
    rows.reserve(layers, [40, 0])
    assert layers[0].keys.shape == (rows.size, 3, 4)
    assert torch.equal(layers[0].keys[:4], states[0, :, :4].transpose(0, 1))
    start = rows.starts[1]
    assert torch.equal(layers[0].keys[start : start + 5], states[0, :, 4:].transpose(0, 1))
    rows.advance([1, 1])
    layers[1].update(states[:, :, :2], states[:, :, :2])
    assert layers[1].keys.shape == (rows.size, 3, 4)
