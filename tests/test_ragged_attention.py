"""The backend `semtoken_varlen` in a model: each row reads its own slots, and nothing is done for padding."""

import copy
import importlib.util
import json

import pytest
import torch
from transformers import AttentionInterface

from semtoken_hf import SemTokenCache, varlen_semtoken
from semtoken_hf.generation_semtoken import GeneratedText
from semtoken_hf.varlen_semtoken import VARLEN
from tests.fixtures.adapted import adapted_model
from tests.fixtures.children import run_clean
from tests.fixtures.logs import warnings_of
from tests.fixtures.ragged import CLOSE, LENGTHS, SLOTS, STEPS, generate
from tests.fixtures.tiny import FEW, plain_twin, ragged_prompts, random_ids, tiny_model


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
@pytest.mark.parametrize("family", FEW)
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
    sdpa, seen = varlen_semtoken.scaled_dot_product_attention, []

    def spy(query, key, value, *args, **kwargs):
        seen.append((query.shape[2], key.shape[2]))
        return sdpa(query, key, value, *args, **kwargs)

    monkeypatch.setattr(varlen_semtoken, "scaled_dot_product_attention", spy)
    generate(model, ids, mask, max_new_tokens=3, min_new_tokens=3)
    layers, groups = model.config.num_hidden_layers, 2
    assert seen[: len(SLOTS)] == [(n, n) for n in SLOTS]
    for step in (1, 2):
        begin = step * layers * len(SLOTS)
        assert seen[begin : begin + len(SLOTS)] == [(groups, n + step) for n in SLOTS]


@pytest.mark.parametrize("chunk", [None, 7])
def test_no_mask_is_made(monkeypatch, chunk):
    """Of all packed slots by all packed slots, it would be the largest tensor of the call."""
    attend, masks = varlen_semtoken.varlen_attention_forward, []

    def spy(module, query, key, value, attention_mask, **kwargs):
        masks.append((kwargs["ragged_attention"] is not None, attention_mask))
        return attend(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(type(varlen_semtoken.ALL_ATTENTION_FUNCTIONS)._global_mapping, VARLEN, spy)
    model = tiny_model(attn_implementation=VARLEN)
    cache = generate(model, *ragged_prompts(LENGTHS), prefill_chunk_size=chunk).past_key_values
    with torch.no_grad():
        model(random_ids(4, 7), past_key_values=cache, logits_to_keep=1)
    assert set(masks) == {(True, None)}


def test_another_revision_in_the_same_process_changes_nothing(monkeypatch):
    """The last one registered serves both, and its kernels may differ."""
    model, prompts = tiny_model(attn_implementation=VARLEN), ragged_prompts(LENGTHS)
    expected = generate(model, *prompts)
    spec = importlib.util.spec_from_file_location("semtoken_hf.other_revision", varlen_semtoken.__file__)
    other = importlib.util.module_from_spec(spec)
    registered = dict(AttentionInterface._global_mapping)
    try:
        spec.loader.exec_module(other)
        assert AttentionInterface._global_mapping[VARLEN] is other.varlen_attention_forward
        monkeypatch.setattr(other, "_kernel_for", None)
        assert torch.equal(generate(model, *prompts).sequences, expected.sequences)
    finally:
        AttentionInterface._global_mapping.update(registered)


@pytest.mark.parametrize("family", FEW)
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

    monkeypatch.setitem(varlen_semtoken.ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
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
    """Bit for bit the padded code path, with a warning where the user could have expected otherwise."""
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
