"""What reaches the attention backends, FlashAttention without a GPU included.

A spy takes the place of FlashAttention's kernel: it picks the keys of each query from a mask, from cumulative lengths
or from positions, in the order in which Transformers does, and computes the rest as eager attention.
"""

import pytest
import torch
from transformers.modeling_flash_attention_utils import _is_packed_sequence, prepare_fa_kwargs_from_position_ids
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import repeat_kv

from semtoken_hf import SemTokenCache
from semtoken_hf.modeling_semtoken import flash_attention_kwargs
from tests.fixtures.tiny import ragged_prompts, random_ids, tiny_model

CLOSE = {"atol": 2e-5, "rtol": 1e-5}
VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def allowed_keys(segments_q, segments_k, queries, keys):
    """bool [Q, K] of the variable-length kernel: causal inside each segment, aligned at its end."""
    allowed = torch.zeros(queries, keys, dtype=torch.bool)
    for i in range(len(segments_q) - 1):
        (q0, q1), (k0, k1) = segments_q[i : i + 2].tolist(), segments_k[i : i + 2].tolist()
        allowed[q0:q1, k0:k1] = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(k1 - k0 - q1 + q0)
    return allowed


class FlashSpy:
    def __init__(self):
        self.calls = []

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        queries, keys, positions = query.shape[2], key.shape[2], kwargs.get("position_ids")
        self.calls.append({"queries": queries, "keys": keys, "mask": attention_mask, **kwargs})
        whole = [torch.tensor([0, n]) for n in (queries, keys)]
        allowed = allowed_keys(*whole, queries, keys)
        if attention_mask is not None:
            assert attention_mask.shape == (len(query), keys)
            allowed = allowed & attention_mask[:, None, None, :].bool()
        elif all(kwargs.get(name) is not None for name in VARLEN):
            assert kwargs["max_length_q"] == int(kwargs["cu_seq_lens_q"].diff().max())
            assert kwargs["max_length_k"] == int(kwargs["cu_seq_lens_k"].diff().max())
            allowed = allowed_keys(kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"], queries, keys)
        elif _is_packed_sequence(positions, len(query)):
            (segments_q, segments_k), _ = prepare_fa_kwargs_from_position_ids(positions)
            allowed = allowed_keys(segments_q, segments_k, queries, keys)
        weights = query @ repeat_kv(key, module.num_key_value_groups).transpose(2, 3) * scaling
        weights = weights.masked_fill(~allowed, torch.finfo(weights.dtype).min).softmax(-1)
        return (weights @ repeat_kv(value, module.num_key_value_groups)).transpose(1, 2).contiguous(), None


@pytest.fixture
def spy(monkeypatch):
    spy = FlashSpy()
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", spy)
    return spy


@pytest.fixture(params=["original", "compact"])
def models(request, spy):
    """The same weights under FlashAttention and under eager attention."""
    flash, eager = (tiny_model(position_mode=request.param, attn_implementation="eager") for _ in range(2))
    # Set behind the loader's back, which refuses FlashAttention on a CPU.
    flash.config._attn_implementation = "flash_attention_2"
    return flash, eager


def generate(model, ids, mask=None, **arguments):
    mask = torch.ones_like(ids) if mask is None else mask
    arguments = {"max_new_tokens": 4, "min_new_tokens": 4, **arguments}
    return model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **arguments)


def assert_same_generation(ours, theirs):
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def assert_whole(call):
    """A call that says that its queries see all keys up to themselves."""
    assert call["mask"] is None
    assert call["cu_seq_lens_q"].tolist() == [0, call["queries"]]
    assert call["cu_seq_lens_k"].tolist() == [0, call["keys"]]
    assert call["cu_seq_lens_q"].dtype == call["cu_seq_lens_k"].dtype == torch.int32
    assert (call["max_length_q"], call["max_length_k"]) == (call["queries"], call["keys"])


def test_gapped_positions_look_packed():
    """Why the lengths are passed: positions alone would be misread."""
    positions = tiny_model().compress(random_ids(1, 96)).position_ids
    assert bool(_is_packed_sequence(positions, 1))
    assert not _is_packed_sequence(torch.arange(96)[None], 1)


@pytest.mark.parametrize(("chunk", "sizes"), [(None, [40]), (16, [16, 16, 8]), (1, [1] * 40)])
def test_one_row(models, spy, chunk, sizes):
    flash, eager = models
    ids = random_ids(1, 96)
    outputs = generate(flash, ids, prefill_chunk_size=chunk)
    calls = spy.calls[:: flash.config.num_hidden_layers]
    assert [call["queries"] for call in calls] == [*sizes, 1, 1, 1]
    assert [call["keys"] for call in calls] == [sum(sizes[: i + 1]) for i in range(len(sizes))] + [41, 42, 43]
    for call in spy.calls:
        assert_whole(call)
    assert_same_generation(outputs, generate(eager, ids))


@pytest.mark.parametrize("chunk", [None, 13])
def test_later_turns_of_one_row(models, spy, chunk):
    """A turn with gaps behind what the cache holds: misread, it would see the first keys only."""
    flash, eager = models
    caches = [SemTokenCache(config=model.config) for model in models]
    ids = random_ids(1, 90)
    for seed in (1, 2):
        outputs, expected = (
            generate(m, ids, past_key_values=c, prefill_chunk_size=chunk)
            for m, c in zip((flash, eager), caches, strict=True)
        )
        assert_same_generation(outputs, expected)
        ids = torch.cat([outputs.sequences, random_ids(1, 70, seed)[:, 1:]], dim=1)
    for call in spy.calls:
        assert_whole(call)


@pytest.mark.parametrize("first", ["ones", "padded"])
def test_later_turn_after_a_mask(models, first):
    """A mask was given, but no column that is held is padding: the turn still has to be read as one sequence."""
    flash, eager = models
    ids, mask = random_ids(1, 96), torch.ones(1, 96, dtype=torch.long)
    if first == "padded":
        ids, mask = (torch.nn.functional.pad(t, (7, 0)) for t in (ids, mask))
    logits = []
    for model in (flash, eager):
        cache, seen = SemTokenCache(config=model.config), mask
        with torch.no_grad():
            for column in (ids, random_ids(1, 2, 3)[:, 1:], random_ids(1, 70, 4)[:, 1:]):
                if column is not ids:
                    seen = torch.cat([seen, torch.ones_like(column)], dim=1)
                outputs = model(column, attention_mask=seen, past_key_values=cache, logits_to_keep=1)
        assert outputs.span_ids is not None
        logits.append(outputs.logits)
    torch.testing.assert_close(*logits, **CLOSE)


@pytest.mark.parametrize("chunk", [None, 16])
def test_padded_rows(models, spy, chunk):
    """The 2D mask of physical columns."""
    flash, eager = models
    ids, mask = ragged_prompts((96, 41))
    outputs = generate(flash, ids, mask, prefill_chunk_size=chunk)
    held = outputs.past_key_values.attention_mask
    for call in spy.calls:
        assert torch.equal(call["mask"].long(), held[:, : call["keys"]])
        assert all(call.get(name) is None for name in VARLEN)
    assert held[1].tolist() == [0] * (40 - 18) + [1] * (18 + 3)
    assert_same_generation(outputs, generate(eager, ids, mask))


def test_equal_rows(models, spy):
    flash, eager = models
    ids = random_ids(2, 96)
    outputs = generate(flash, ids)
    assert all(call["mask"] is None for call in spy.calls)
    assert_same_generation(outputs, generate(eager, ids))


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash_attention_2"])
@pytest.mark.parametrize("lengths", [(96,), (96, 41)])
def test_without_cache(spy, attention, lengths):
    """No cache and no mask would mean packed sequences: the mask is explicit."""
    model, reference = tiny_model(attn_implementation="eager"), tiny_model(attn_implementation="eager")
    model.config._attn_implementation = attention
    ids, mask = ragged_prompts(lengths)
    mask = mask if len(lengths) > 1 else None
    with torch.no_grad():
        outputs = model.model(ids, attention_mask=mask, compression=True, use_cache=False)
        expected = reference.model(ids, attention_mask=mask, compression=True, use_cache=True)
    assert outputs.past_key_values is None
    assert outputs.last_hidden_state.shape[1] == 40
    real = torch.arange(40) >= 40 - outputs.compressed_lengths[:, None]
    torch.testing.assert_close(outputs.last_hidden_state[real], expected.last_hidden_state[real], **CLOSE)
    assert bool(spy.calls) == (attention == "flash_attention_2")
    for call in spy.calls if len(lengths) == 1 else []:
        assert_whole(call)


@pytest.mark.parametrize(
    ("attention", "batch_size", "is_given"),
    [
        ("flash_attention_2", 1, True),
        ("flash_attention_3", 1, True),
        ("kernels-community/flash-attn2", 1, True),
        ("flash_attention_2", 2, False),
        ("sdpa", 1, False),
        ("eager", 1, False),
        (None, 1, False),
    ],
)
def test_who_gets_lengths(attention, batch_size, is_given):
    given = flash_attention_kwargs(attention, batch_size, 3, 9, torch.device("cpu"))
    assert set(given) == (set(VARLEN) if is_given else set())
