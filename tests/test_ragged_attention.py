"""The backend `semtoken_varlen`: each row reads its own slots, whatever kernel does it; nothing is done for padding."""

import copy
import importlib.util
import json
import sys
import types

import pytest
import torch
from transformers import AttentionInterface

from semtoken_hf import SemTokenCache, attention_semtoken
from semtoken_hf.attention_semtoken import VARLEN
from semtoken_hf.generation_semtoken import GeneratedText
from semtoken_hf.ragged_cache_semtoken import RaggedRows, RaggedStep
from tests.fixtures.adapted import adapted_model
from tests.fixtures.children import run_clean
from tests.fixtures.logs import warnings_of
from tests.fixtures.tiny import FAMILIES, plain_twin, ragged_prompts, random_ids, tiny_model

CLOSE = {"atol": 2e-5, "rtol": 1e-5}
# The last row is too short to be compressed.
LENGTHS, SLOTS, STEPS = (96, 70, 41, 10), [40, 30, 18, 10], 5


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
        monkeypatch.setattr(attention_semtoken, "_row_by_row", counted(attention_semtoken._row_by_row))
    else:
        is_installed = request.param == "flash-attn"
        monkeypatch.setattr(attention_semtoken, "_is_fit_for_flash", lambda query: True)
        monkeypatch.setattr(attention_semtoken, "is_flash_attn_2_available", lambda: is_installed)
        module = types.SimpleNamespace(flash_attn_varlen_func=counted(fake_flash))
        monkeypatch.setitem(sys.modules, "flash_attn", module)
        monkeypatch.setattr(attention_semtoken, "_torch_varlen", lambda: counted(fake_torch))
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
    ours = attention_semtoken.attend_ragged(query.transpose(0, 1)[None], keys, values, step, scaling=0.3)
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


def generate(model, ids, mask, **arguments):
    arguments = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, **arguments}
    return model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **arguments)


def assert_same_generation(ours, theirs):
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_through_the_model(kernel, family, positions, chunk):
    """Against the padded road of SDPA."""
    ours, theirs = (
        tiny_model(family=family, position_mode=positions, attn_implementation=name) for name in (VARLEN, "sdpa")
    )
    ids, mask = ragged_prompts(LENGTHS)
    outputs = generate(ours, ids, mask, prefill_chunk_size=chunk)
    assert outputs.past_key_values.ragged_rows.lengths == [n + STEPS - 1 for n in SLOTS]
    assert_same_generation(outputs, generate(theirs, ids, mask))


def widths_of(model, run):
    """Shapes [B, N] that the first decoder layer sees."""
    seen, layers = [], model.base_model.layers
    handle = layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple((args[0] if args else kwargs["hidden_states"]).shape[:2])),
        with_kwargs=True,
    )
    run()
    handle.remove()
    return seen


@pytest.mark.parametrize(("chunk", "prefill"), [(None, [98]), (10, [40, 40, 18])])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_see_no_padding(family, chunk, prefill):
    model = tiny_model(family=family, attn_implementation=VARLEN)
    ids, mask = ragged_prompts(LENGTHS)
    assert sum(SLOTS) == 98
    seen = widths_of(model, lambda: generate(model, ids, mask, prefill_chunk_size=chunk))
    assert seen == [(1, n) for n in prefill] + [(1, len(LENGTHS))] * (STEPS - 1)


def test_a_turn_without_its_padding():
    """Later turns, merged or not: columns that the mask hides are not read."""
    model = tiny_model(attn_implementation=VARLEN)
    ids, mask = ragged_prompts(LENGTHS)
    turn, hidden = ragged_prompts((6, 3, 5, 1), seed=9)
    seen, cache = [], SemTokenCache(model.config)
    with torch.no_grad():
        for columns, new in ((ids, mask), (turn, hidden)):
            whole = new if columns is ids else torch.cat([mask, new], 1)
            seen += widths_of(
                model,
                lambda c=columns, m=whole: model(c, attention_mask=m, past_key_values=cache, logits_to_keep=1),
            )
    assert seen == [(1, 98), (1, 15)]
    assert cache.ragged_rows.lengths == [46, 33, 23, 11]


def test_decoding_reads_own_slots_alone(monkeypatch):
    model = tiny_model(attn_implementation=VARLEN)
    ids, mask = ragged_prompts(LENGTHS)
    sdpa, seen = attention_semtoken.scaled_dot_product_attention, []

    def spy(query, key, value, *args, **kwargs):
        seen.append((query.shape[2], key.shape[2]))
        return sdpa(query, key, value, *args, **kwargs)

    monkeypatch.setattr(attention_semtoken, "scaled_dot_product_attention", spy)
    generate(model, ids, mask, max_new_tokens=3, min_new_tokens=3)
    layers, groups = model.config.num_hidden_layers, 2
    assert seen[: len(SLOTS)] == [(n, n) for n in SLOTS]
    for step in (1, 2):
        begin = step * layers * len(SLOTS)
        assert seen[begin : begin + len(SLOTS)] == [(groups, n + step) for n in SLOTS]


@pytest.mark.parametrize("chunk", [None, 7])
def test_no_mask_is_made(monkeypatch, chunk):
    """Of all packed slots by all packed slots, it would be the largest tensor of the call."""
    attend, masks = attention_semtoken.varlen_attention_forward, []

    def spy(module, query, key, value, attention_mask, **kwargs):
        masks.append((kwargs["ragged_attention"] is not None, attention_mask))
        return attend(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(type(attention_semtoken.ALL_ATTENTION_FUNCTIONS)._global_mapping, VARLEN, spy)
    model = tiny_model(attn_implementation=VARLEN)
    cache = generate(model, *ragged_prompts(LENGTHS), prefill_chunk_size=chunk).past_key_values
    with torch.no_grad():
        model(random_ids(4, 7), past_key_values=cache, logits_to_keep=1)
    assert set(masks) == {(True, None)}


def test_another_revision_in_the_same_process_changes_nothing(monkeypatch):
    """The last one registered serves both, and its kernels may differ."""
    model, prompts = tiny_model(attn_implementation=VARLEN), ragged_prompts(LENGTHS)
    expected = generate(model, *prompts)
    spec = importlib.util.spec_from_file_location("semtoken_hf.other_revision", attention_semtoken.__file__)
    other = importlib.util.module_from_spec(spec)
    registered = dict(AttentionInterface._global_mapping)
    try:
        spec.loader.exec_module(other)
        assert AttentionInterface._global_mapping[VARLEN] is other.varlen_attention_forward
        monkeypatch.setattr(other, "_kernel_for", None)
        assert torch.equal(generate(model, *prompts).sequences, expected.sequences)
    finally:
        AttentionInterface._global_mapping.update(registered)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_those_of_single_prompts(family):
    """In bits of fp32 that a longer matrix product may change, nothing else."""
    model = tiny_model(family=family, attn_implementation=VARLEN)
    ids, mask = ragged_prompts(LENGTHS)
    together = generate(model, ids, mask)
    for row, real in enumerate(mask.bool()):
        alone = generate(model, ids[row, real][None], mask[row, real][None])
        assert torch.equal(together.sequences[row, -STEPS:], alone.sequences[0, -STEPS:])
        for a, b in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(a[row], b[0], **CLOSE)


@pytest.mark.parametrize("compact", [False, True])
def test_no_step_waits_for_the_device(compact, monkeypatch):
    """On the meta device there is no data: a step that had to know any on the host would fail, as it would have to wait
    on a GPU. A list copied straight to a device waits, too."""
    arguments = {"position_mode": "compact" if compact else "original", "recompress_every": 50}
    real = torch.tensor

    def tensor(*args, **kwargs):
        assert kwargs.get("device") is None
        return real(*args, **kwargs)

    def flash(module, query, key, value, attention_mask, **kwargs):
        assert kwargs["max_length_k"] == key.shape[2]
        return query.transpose(1, 2), None

    monkeypatch.setitem(attention_semtoken.ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
    for attention, lengths in ((VARLEN, LENGTHS), ("sdpa", (96, 96)), ("flash_attention_2", (96,))):
        model = tiny_model(**arguments, attn_implementation="sdpa" if attention == "flash_attention_2" else attention)
        ids, mask = ragged_prompts(lengths)
        # As in `generate`: no mask where nothing is padding. Given one, Transformers looks whether it is all ones.
        mask = mask if attention == VARLEN else None
        with torch.no_grad():
            cache = model(ids, attention_mask=mask, logits_to_keep=1).past_key_values
        model = copy.deepcopy(model).to("meta")
        model.config._attn_implementation = attention
        cache.slot_lengths = cache.slot_lengths.to("meta")
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.to("meta"), layer.values.to("meta")
        cache.generated = GeneratedText(ids.shape[1])
        ids = torch.cat([ids, ids[:, -1:]], 1).to("meta")
        mask = None if mask is None else torch.cat([mask, mask[:, -1:]], 1).to("meta")
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(torch, "tensor", tensor)
            inputs = model.prepare_inputs_for_generation(
                ids, next_sequence_length=1, past_key_values=cache, attention_mask=mask, is_first_iteration=False
            )
            assert inputs["input_ids"].shape[1] == 1
            logits = model(**inputs, logits_to_keep=1).logits
        assert logits.shape == (len(lengths), 1, model.config.vocab_size)
        assert cache.get_seq_length() == ids.shape[1]


@pytest.mark.parametrize("reason", ["gradients", "training", "window", "window of no layer", "quantised"])
def test_padded_where_rows_cannot_be_ragged(reason, caplog):
    """Bit for bit the padded road, with a warning where the user could have expected otherwise."""
    fields = {"family": "mistral", "sliding_window": 16} if "window" in reason else {}
    ours, theirs = (tiny_model(**fields, attn_implementation=name) for name in (VARLEN, "sdpa"))
    ids, mask = ragged_prompts(LENGTHS)
    arguments = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    for model in (ours, theirs):
        model.train(reason == "training")
    if reason == "quantised":
        pytest.importorskip("transformers.cache_utils")
        from transformers import cache_utils

        if not hasattr(cache_utils, "Fp8QuantizedLayer"):
            pytest.skip("this Transformers has no fp8 cache")
        a, b = (torch.stack(generate(m, ids, mask, **arguments).logits) for m in (ours, theirs))
    else:
        with torch.set_grad_enabled(reason == "gradients"):
            # Made without the configuration, a cache has plain layers, and the mask alone knows the window.
            caches = [SemTokenCache() if reason == "window of no layer" else None for _ in range(2)]
            calls = zip((ours, theirs), caches, strict=True)
            a, b = (m(ids, attention_mask=mask, logits_to_keep=2, past_key_values=cache) for m, cache in calls)
        assert a.past_key_values.ragged_rows is None
        a, b = a.logits, b.logits
        if reason == "gradients":
            for logits in (a, b):
                logits.nan_to_num().sum().backward()
            for x, y in zip(ours.model.layers.parameters(), theirs.model.layers.parameters(), strict=True):
                assert torch.equal(x.grad, y.grad)
    assert torch.equal(a, b)
    messages = [m for m in warnings_of(caplog) if VARLEN in m]
    assert len(messages) == (reason not in ("gradients", "training"))


def test_gradients_of_a_turn_behind_a_ragged_cache():
    """Such a turn cannot go back to padding, and its gradients are those of padded layers."""
    gradients, turn = [], random_ids(len(LENGTHS), 30, seed=1)
    for attention in (VARLEN, "sdpa"):
        model, cache = tiny_model(attn_implementation=attention), SemTokenCache()
        ids, mask = ragged_prompts(LENGTHS)
        with torch.no_grad():
            model(ids, attention_mask=mask, logits_to_keep=1, past_key_values=cache)
        assert (cache.ragged_rows is not None) == (attention == VARLEN)
        logits = model(turn, past_key_values=cache).logits
        loss = logits.log_softmax(-1)[..., 5].sum()
        gradients.append(torch.autograd.grad(loss, list(model.model.layers.parameters())))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_another_attention_cannot_read_the_cache():
    model = tiny_model(attn_implementation=VARLEN)
    ids, mask = ragged_prompts(LENGTHS)
    cache = generate(model, ids, mask).past_key_values
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="set it back"), torch.no_grad():
        model(ids[:, :1], past_key_values=cache)


def test_hidden_states_are_laid_out():
    ours, theirs = (tiny_model(attn_implementation=name) for name in (VARLEN, "sdpa"))
    ids, mask = ragged_prompts(LENGTHS)
    with torch.no_grad():
        a, b = (
            m(ids, attention_mask=mask, logits_to_keep=1, output_hidden_states=True).hidden_states
            for m in (ours, theirs)
        )
    assert len(a) == len(b) == ours.config.num_hidden_layers + 1
    real = torch.arange(SLOTS[0]) >= SLOTS[0] - torch.tensor(SLOTS)[:, None]
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape
        torch.testing.assert_close(x[real], y[real], **CLOSE)
        assert not x[~real].any()


@pytest.mark.parametrize("chunk", [None, 7])
def test_the_adapter_acts_on_its_rows(chunk):
    """The row that is not compressed is read without it, column by column of the packed rows."""
    ours, theirs = (adapted_model(attn_implementation=name) for name in (VARLEN, "sdpa"))
    ids, mask = ragged_prompts(LENGTHS)
    a, b = (generate(model, ids, mask, prefill_chunk_size=chunk) for model in (ours, theirs))
    assert a.past_key_values.ragged_rows is not None
    assert torch.equal(a.sequences, b.sequences)
    for x, y in zip(a.logits, b.logits, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    plain = generate(plain_twin(tiny_model(attn_implementation="sdpa")), ids, mask)
    assert not torch.equal(a.logits[0][0], plain.logits[0][0])


def test_a_plain_model_reads_as_under_sdpa():
    """The name is registered for any model: bit for bit SDPA, masks included."""
    ours, theirs = (plain_twin(tiny_model(attn_implementation=name)) for name in (VARLEN, "sdpa"))
    ids, mask = ragged_prompts(LENGTHS)
    with torch.no_grad():
        for call in ({"attention_mask": mask}, {}, {"position_ids": torch.arange(96).remainder(40)[None]}):
            assert torch.equal(ours(ids, **call).logits, theirs(ids, **call).logits)


def test_which_kernel(monkeypatch):
    """FlashAttention where it runs, in half precision and with heads of a size it knows; else that of PyTorch."""
    choose, half = attention_semtoken._kernel_for, torch.randn(3, 4, 64, dtype=torch.bfloat16)
    assert choose(half) is attention_semtoken._row_by_row
    fits = attention_semtoken._is_fit_for_flash
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
    monkeypatch.setattr(attention_semtoken, "_is_fit_for_flash", lambda query: True)
    for is_installed, varlen, name in (
        (True, None, "_flash_attention"),
        (False, fake_torch, "_torch_attention"),
        (False, None, "_row_by_row"),
    ):
        monkeypatch.setattr(attention_semtoken, "is_flash_attn_2_available", lambda found=is_installed: found)
        monkeypatch.setattr(attention_semtoken, "_torch_varlen", lambda found=varlen: found)
        assert choose(half) is getattr(attention_semtoken, name)


def test_the_kernel_of_pytorch_is_asked_for_its_arguments(monkeypatch):
    """It came in 2.10 with fewer; a version without one of them is not used."""
    find = attention_semtoken._torch_varlen.__wrapped__
    for function in (fake_torch, lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False: None):
        module = types.SimpleNamespace(varlen_attn=function)
        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
        assert find() is (function if function is fake_torch else None)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    assert find() is None


REMOTE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, attn_implementation="semtoken_varlen")
ids = torch.tensor(json.loads(sys.argv[2]))
out = model.generate(
    ids, attention_mask=(ids != 0).long(), max_new_tokens=5, min_new_tokens=5, return_dict_in_generate=True
)
facts = {"lengths": out.past_key_values.ragged_rows.lengths, "text": out.sequences[:, -5:].tolist()}
print("FACTS" + json.dumps({**facts, "module": type(model).__module__.split(".")[0]}))
"""


def test_remote_code_brings_it(tmp_path):
    """A checkpoint's own modules register the backend when they are loaded."""
    model = tiny_model(attn_implementation="sdpa")
    model.save_pretrained(tmp_path / "checkpoint")
    ids, mask = ragged_prompts(LENGTHS)
    facts = run_clean(REMOTE, tmp_path / "checkpoint", json.dumps(ids.tolist()), home=tmp_path / "home")
    assert facts["module"] == "transformers_modules"
    assert facts["lengths"] == [n + STEPS - 1 for n in SLOTS]
    assert facts["text"] == generate(model, ids, mask).sequences[:, -STEPS:].tolist()


def test_continuous_batching_has_its_own_attention():
    """Transformers names what it takes; blocks of slots hold no padding anyway."""
    with pytest.raises(ValueError, match=VARLEN):
        tiny_model(attn_implementation=VARLEN).generate_batch([[1, 5, 7]], max_new_tokens=2)
