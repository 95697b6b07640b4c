"""Law 8: what is done to a cache: reorder, repeat, select, crop, reset, copy, offload."""

import copy
import itertools

import pytest
import torch
from transformers import DynamicCache

from semtoken_hf import SemTokenCache
from tests.fixtures.tiny import plain_twin, ragged_prompts, random_ids, tiny_model

from .cases import CLOSE, POSITIONS, Case, model_of

LENGTHS = (96, 41)


@pytest.fixture(
    params=[*itertools.product(["llama"], POSITIONS), ("gpt_neox", "original"), ("gpt2", "compact")], ids="-".join
)
def model(request):
    family, positions = request.param
    return model_of(Case(family, positions=positions))


def prefill(model, ids, mask=None, **arguments):
    with torch.no_grad():
        return model(
            ids, attention_mask=mask, logits_to_keep=1, past_key_values=SemTokenCache(model.config), **arguments
        )


def keys_and_values(cache):
    return [t for layer in cache.layers for t in (layer.keys, layer.values)]


def decode(model, cache, token, mask=None, steps=5):
    """Greedy tokens int64 [B, steps] and the last logits, by hand."""
    tokens = []
    for _ in range(steps):
        tokens.append(token)
        mask = None if mask is None else torch.cat([mask, torch.ones_like(token)], dim=1)
        with torch.no_grad():
            logits = model(token, attention_mask=mask, past_key_values=cache, logits_to_keep=1).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
    return torch.cat(tokens, dim=1), logits


def test_lengths(model):
    ids, mask = ragged_prompts(LENGTHS)
    outputs = prefill(model, ids, mask)
    cache, prompt = outputs.past_key_values, model.compress(ids, mask)
    assert cache.get_seq_length() == 96
    assert cache.original_lengths.tolist() == [96, 41]
    assert cache.compressed_lengths.tolist() == prompt.kept_lengths.tolist() == outputs.compressed_lengths.tolist()
    assert cache.physical_length() == cache.get_query_offset() == cache.layers[0].keys.shape[2] == 40
    assert cache.get_mask_sizes(1, 0) == (41, 0)
    assert torch.equal(cache.slot_lengths, prompt.slot_lengths)
    assert torch.equal(cache.attention_mask, prompt.attention_mask)
    assert cache.is_compressed

    decode(model, cache, ids[:, -1:], mask, steps=3)
    assert cache.get_seq_length() == 99
    assert cache.original_lengths.tolist() == [99, 44]
    assert cache.physical_length() == 43


def test_padding_is_remembered(model):
    """Later calls need no mask: which columns are padding is on record."""
    ids, mask = ragged_prompts(LENGTHS)
    caches = [prefill(model, ids, mask).past_key_values for _ in range(2)]
    given, remembered = (decode(model, c, ids[:, -1:], m) for c, m in zip(caches, (mask, None), strict=True))
    assert torch.equal(given[0], remembered[0])
    assert torch.equal(given[1], remembered[1])


def test_empty():
    cache = SemTokenCache(tiny_model().config)
    assert cache.get_seq_length() == cache.physical_length() == cache.memory_bytes() == 0
    assert cache.original_lengths is cache.compressed_lengths is cache.attention_mask is None
    cache.crop(-1)
    cache.reset()


def test_uncompressed_cache_is_a_dynamic_cache():
    model = tiny_model()
    ids, mask = ragged_prompts(LENGTHS)
    ours, theirs = prefill(model, ids, mask, compression=False).past_key_values, DynamicCache()
    plain_twin(model)(ids, attention_mask=mask, past_key_values=theirs)
    assert not ours.is_compressed
    assert ours.get_seq_length() == ours.physical_length() == 96
    for a, b in zip(keys_and_values(ours), keys_and_values(theirs), strict=True):
        assert torch.equal(a, b)


def test_memory_of_a_long_prompt():
    """The law, in bytes that somebody else counted."""
    model = tiny_model(attn_implementation="sdpa", min_prompt_length=256)
    ids = random_ids(1, 8192)
    plain = DynamicCache()
    with torch.no_grad():
        plain_twin(model)(ids, past_key_values=plain, logits_to_keep=1)
        cache = model(ids, logits_to_keep=1).past_key_values
    counted, expected = (sum(t.nbytes for t in keys_and_values(c)) for c in (cache, plain))
    assert cache.memory_bytes() == counted
    assert counted <= expected / 2.39
    assert cache.get_seq_length() == 8192


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    ],
    ids=["reorder", "double", "repeat", "select"],
)
def test_rows_move(model, change, rows):
    """Keys and the record move together: what is decoded next is what those rows alone would decode."""
    ids, mask = ragged_prompts(LENGTHS)
    cache = prefill(model, ids, mask).past_key_values
    before, lengths = copy.deepcopy(keys_and_values(cache)), cache.slot_lengths
    change(cache)
    assert torch.equal(cache.slot_lengths, lengths[rows])
    for ours, theirs in zip(keys_and_values(cache), before, strict=True):
        assert torch.equal(ours, theirs[rows])
    assert cache.get_seq_length() == 96
    expected = prefill(model, ids[rows], mask[rows]).past_key_values
    token = ids[rows, :1] + 7
    tokens, logits = decode(model, cache, token, mask[rows])
    expected_tokens, expected_logits = decode(model, expected, token, mask[rows])
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected_logits, **CLOSE)


def test_crop(model):
    """Cropping what was appended one by one is as if it had never been."""
    ids, mask = ragged_prompts(LENGTHS)
    cache, untouched = (prefill(model, ids, mask).past_key_values for _ in range(2))
    decode(model, cache, ids[:, -1:], mask, steps=6)
    cache.crop(-6)
    assert cache.get_seq_length() == 96
    assert torch.equal(cache.slot_lengths, untouched.slot_lengths)
    for ours, theirs in zip(keys_and_values(cache), keys_and_values(untouched), strict=True):
        assert torch.equal(ours, theirs)
    token = ids[:, 50:51]
    ours, theirs = (decode(model, c, token, mask) for c in (cache, untouched))
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


def test_crop_to_a_length():
    """The older spelling of Transformers: a positive number is the length to keep, in original tokens."""
    ids = random_ids(1, 96)
    cache = prefill(tiny_model(), ids).past_key_values
    cache.crop(94)
    assert (cache.get_seq_length(), cache.physical_length()) == (94, 38)
    cache.crop(200)
    cache.crop(0)
    assert (cache.get_seq_length(), cache.physical_length()) == (94, 38)


@pytest.mark.parametrize("count", [-5, -95, -1000, 30])
def test_crop_into_merged_slots(count):
    """The tail that stays whole is four tokens; five reach into a merged slot. A refusal changes nothing."""
    model = tiny_model(recent_window=4, segmentation_mode="uniform")
    cache = prefill(model, random_ids(1, 96)).past_key_values
    lengths = cache.slot_lengths
    assert lengths[0, -5] > 1
    copy.deepcopy(cache).crop(-4)
    with pytest.raises(ValueError, match="merged slots"):
        cache.crop(count)
    assert torch.equal(cache.slot_lengths, lengths)
    assert cache.physical_length() == lengths.shape[1]
    assert cache.get_seq_length() == 96


def test_reset(model):
    """A reset cache is a new one."""
    ids, mask = ragged_prompts(LENGTHS)
    other = random_ids(1, 60, seed=5)
    cache = prefill(model, ids, mask).past_key_values
    cache.reset()
    assert (cache.get_seq_length(), cache.physical_length()) == (0, 0)
    assert cache.slot_lengths is None
    assert not cache.is_compressed
    expected = prefill(model, other)
    with torch.no_grad():
        outputs = model(other, logits_to_keep=1, past_key_values=cache)
    assert torch.equal(outputs.logits, expected.logits)
    for ours, theirs in zip(keys_and_values(cache), keys_and_values(expected.past_key_values), strict=True):
        assert torch.equal(ours, theirs)


def test_deepcopy(model):
    ids, mask = ragged_prompts(LENGTHS)
    cache = prefill(model, ids, mask).past_key_values
    twin = copy.deepcopy(cache)
    expected = decode(model, cache, ids[:, -1:], mask)
    assert (twin.get_seq_length(), twin.physical_length()) == (96, 40)
    assert torch.equal(decode(model, twin, ids[:, -1:], mask)[0], expected[0])


def test_offloading_is_kept(monkeypatch):
    """`cache_implementation="offloaded"` asks for the flag; the copies themselves need a second device."""
    model, caches = tiny_model(), []

    def stop(*args, past_key_values, **kwargs):
        caches.append(past_key_values)
        raise InterruptedError

    monkeypatch.setattr(model.model, "forward", stop)
    with pytest.raises(InterruptedError):
        model.generate(random_ids(1, 96), max_new_tokens=2, cache_implementation="offloaded")
    assert isinstance(caches[0], SemTokenCache)
    assert caches[0].offloading


def test_prepared_masks(model):
    """Over a cache without merged slots they are the plain model's; with some they fit nothing."""
    ids = random_ids(1, 40)
    causal = torch.ones(40, 40, dtype=torch.bool).tril()[None, None]
    cache, plain = SemTokenCache(model.config), DynamicCache(config=model.config)
    with torch.no_grad():
        ours = model(ids, attention_mask=causal, past_key_values=cache)
        theirs = plain_twin(model)(ids, attention_mask=causal, past_key_values=plain)
    assert torch.equal(ours.logits, theirs.logits)
    assert cache.slot_lengths.tolist() == [[1] * 40]
    cache = prefill(model, ids).past_key_values
    held = cache.slot_lengths.clone()
    with pytest.raises(ValueError, match="pass a 2D mask"), torch.no_grad():
        model(ids[:, :1], attention_mask=causal[:, :, -1:], past_key_values=cache)
    assert torch.equal(cache.slot_lengths, held)
