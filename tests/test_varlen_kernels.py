"""The kernels behind `semtoken_varlen`: each gives every row its own slots; which of them is chosen."""

import sys
import types

import pytest
import torch

from semtoken_hf import varlen_semtoken
from semtoken_hf.varlen_semtoken import VARLEN, RaggedRows, RaggedStep
from tests.fixtures.ragged import LENGTHS, SLOTS, STEPS, assert_same_generation, generate
from tests.fixtures.tiny import FEW, ragged_prompts, tiny_model


def eager(query, keys, values, scaling):
    """Attention [n, H, D] of one row, causal from its end, written out."""
    groups = query.shape[1] // keys.shape[1]
    keys, values = (states.repeat_interleave(groups, dim=1) for states in (keys, values))
    weights = torch.einsum("qhd,khd->hqk", query, keys) * scaling
    allowed = torch.ones(len(query), len(keys), dtype=torch.bool).tril(len(keys) - len(query))
    return torch.einsum("hqk,khd->qhd", weights.masked_fill(~allowed, -torch.inf).softmax(-1), values)


def variable_length(query, keys, values, cu_q, cu_k, max_q, max_k, scaling, is_causal, is_local=False):
    """What FlashAttention documents, by a loop over its cumulative lengths."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert cu_q[0] == cu_k[0] == 0
    assert cu_q[-1] == len(query)
    assert cu_k[-1] <= len(keys)
    counts, held = cu_q.diff().tolist(), cu_k.diff().tolist()
    assert max(counts) == max_q
    assert max(held) == max_k
    if max_q == 1 and query.shape[1] > keys.shape[1] and not is_local:
        # Its short cut for single queries takes their number for that of the sequences, empty ones included.
        assert len(counts) == len(query)
    out = torch.full_like(query, torch.nan)
    for i, (count, length) in enumerate(zip(counts, held, strict=True)):
        q, k, v = query[cu_q[i] : cu_q[i + 1]], keys[cu_k[i] : cu_k[i + 1]], values[cu_k[i] : cu_k[i + 1]]
        if count:
            rows = [q] if is_causal else [one[None] for one in q]
            assert count <= length or not is_causal
            out[cu_q[i] : cu_q[i + 1]] = torch.cat([eager(row, k, v, scaling) for row in rows])
    return out


def fake_flash(query, keys, values, cu_q, cu_k, max_q, max_k, softmax_scale=None, causal=False):
    return variable_length(query, keys, values, cu_q, cu_k, max_q, max_k, softmax_scale, causal)


def fake_torch(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert window_size in ((-1, 0), (-1, -1))
    is_causal = window_size == (-1, 0)
    return variable_length(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, is_causal, is_causal)


@pytest.fixture(params=["row by row", "flash-attn", "torch"])
def kernel(request, monkeypatch):
    """One of the kernels, those of a GPU replaced by what they document; counts its calls."""
    calls = []

    def counted(function):
        return lambda *args, **kwargs: calls.append(args[0].shape) or function(*args, **kwargs)

    if request.param == "row by row":
        monkeypatch.setattr(varlen_semtoken, "_row_by_row", counted(varlen_semtoken._row_by_row))
    else:
        is_installed = request.param == "flash-attn"
        monkeypatch.setattr(varlen_semtoken, "_is_fit_for_flash", lambda query: True)
        monkeypatch.setattr(varlen_semtoken, "is_flash_attn_2_available", lambda: is_installed)
        module = types.SimpleNamespace(flash_attn_varlen_func=counted(fake_flash))
        monkeypatch.setitem(sys.modules, "flash_attn", module)
        monkeypatch.setattr(varlen_semtoken, "_torch_varlen", lambda: counted(fake_torch))
    yield calls
    assert calls


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(
    ("queries", "past"),
    [
        ((5, 1, 7), (0, 0, 0)),
        ((1, 1, 1), (9, 0, 40)),
        ((3, 5, 2), (9, 0, 40)),
        ((0, 4, 0), (6, 3, 2)),
        ((0, 1, 1), (6, 3, 2)),
        ((1,), (70,)),
        ((8,), (3,)),
    ],
)
def test_each_row_reads_its_own_slots(kernel, heads, queries, past):
    torch.manual_seed(0)
    rows = RaggedRows(len(queries))
    rows.reserve([], [p + q for p, q in zip(past, queries, strict=True)])
    rows.advance(list(past))
    step = rows.advance(list(queries))
    query = torch.randn(sum(queries), heads[0], 8)
    # What lies in the room behind a row would spoil whatever reads it.
    keys, values = (torch.full((rows.size, heads[1], 8), torch.nan) for _ in range(2))
    for start, length in zip(step.starts, step.lengths, strict=True):
        for states in (keys, values):
            states[start : start + length] = torch.randn(length, heads[1], 8)
    ours = varlen_semtoken.attend_ragged(query.transpose(0, 1)[None], keys, values, step, scaling=0.3)
    assert ours.shape == (1, sum(queries), heads[0], 8)
    end, expected = 0, []
    for count, start, length in zip(queries, step.starts, step.lengths, strict=True):
        held = slice(start, start + length)
        expected.append(eager(query[end : end + count], keys[held], values[held], 0.3))
        end += count
    torch.testing.assert_close(ours[0], torch.cat(expected), atol=1e-6, rtol=1e-5)


def test_lengths_of_a_kernel():
    """The room behind a row is a sequence without queries; the last row needs none."""
    step = RaggedStep([2, 0, 3], [0, 30, 50], [7, 15, 9])
    cu_q, cu_k, max_q, max_k = step.cumulative(torch.device("cpu"), 4)
    assert cu_q.tolist() == [0, 8, 8, 8, 8, 20]
    assert cu_k.tolist() == [0, 7, 30, 45, 50, 59]
    assert (max_q, max_k) == (12, 23)
    assert step.cumulative(torch.device("cpu"), 4)[0] is cu_q
    assert step.cumulative(torch.device("cpu"), 1)[0].tolist() == [0, 2, 2, 2, 2, 5]
    assert step.places(torch.device("cpu")).tolist() == [5, 6, 56, 57, 58]


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("family", FEW)
def test_every_kernel_through_the_model(kernel, family, positions, chunk):
    """Against the padded code path of SDPA."""
    ours, theirs = (
        tiny_model(family=family, position_mode=positions, attn_implementation=name) for name in (VARLEN, "sdpa")
    )
    ids, mask = ragged_prompts(LENGTHS)
    outputs = generate(ours, ids, mask, prefill_chunk_size=chunk)
    assert outputs.past_key_values.ragged_rows.lengths == [n + STEPS - 1 for n in SLOTS]
    assert_same_generation(outputs, generate(theirs, ids, mask))


def test_which_kernel(monkeypatch):
    """FlashAttention where it runs, in half precision and with heads of a size it knows; else that of PyTorch."""
    choose, half = varlen_semtoken._kernel_for, torch.randn(3, 4, 64, dtype=torch.bfloat16)
    assert choose(half) is varlen_semtoken._row_by_row
    fits = varlen_semtoken._is_fit_for_flash
    gpu = types.SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device=torch.device("cuda", 0), shape=(3, 4, 64))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for change, capability, is_fit in (
        ({}, (8, 0), True),
        ({"dtype": torch.float16}, (9, 0), True),
        ({"dtype": torch.float32}, (9, 0), False),
        ({"shape": (3, 4, 60)}, (9, 0), False),
        ({"shape": (3, 4, 320)}, (9, 0), False),
        ({}, (7, 5), False),
        ({"is_cuda": False}, (9, 0), False),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert fits(types.SimpleNamespace(**{**vars(gpu), **change})) == is_fit
    monkeypatch.setattr(varlen_semtoken, "_is_fit_for_flash", lambda query: True)
    for is_installed, varlen, name in (
        (True, None, "_flash_attention"),
        (False, fake_torch, "_torch_attention"),
        (False, None, "_row_by_row"),
    ):
        monkeypatch.setattr(varlen_semtoken, "is_flash_attn_2_available", lambda found=is_installed: found)
        monkeypatch.setattr(varlen_semtoken, "_torch_varlen", lambda found=varlen: found)
        assert choose(half) is getattr(varlen_semtoken, name)


def test_the_kernel_of_pytorch_is_asked_for_its_arguments(monkeypatch):
    """It came in 2.10 with fewer; a version without one of them is not used."""
    find = varlen_semtoken._torch_varlen.__wrapped__
    for function in (fake_torch, lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False: None):
        module = types.SimpleNamespace(varlen_attn=function)
        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
        assert find() is (function if function is fake_torch else None)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    assert find() is None
