"""Static caches hold slots: their size, one graph for every step and prompt, the text of the default cache."""

from __future__ import annotations

import pytest
import torch
from transformers import CompileConfig

from semtoken_hf import SemTokenCache, SemTokenStaticCache
from tests.fixtures.adapted import adapted_model
from tests.fixtures.logs import warnings_of
from tests.fixtures.tiny import plain_twin, ragged_prompts, random_ids, tiny_model

NEW = 8
STATIC = {"cache_implementation": "static"}
LENGTHS = (96, 41)
RATIO = 3.0
SLOTS = 32


@pytest.fixture
def whole_graphs():
    """Arguments that compile each step without a break, and the graphs so far."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = CompileConfig(backend="eager", fullgraph=True)
    config._compile_all_devices = True
    yield {**STATIC, "compile_config": config}, lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def generate(model, lengths=LENGTHS, **arguments):
    ids, mask = ragged_prompts(lengths)
    arguments = {"do_sample": False, "target_ratio": RATIO, "min_new_tokens": NEW, "max_new_tokens": NEW, **arguments}
    torch.manual_seed(3)
    return model.generate(ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **arguments)


def check_same(ours, expected):
    assert torch.equal(ours.sequences, expected.sequences)
    for a, b in zip(ours.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def models():
    for family, mode in (("llama", "original"), ("llama", "compact"), ("gpt_neox", "original"), ("gpt2", "compact")):
        yield pytest.param(lambda f=family, m=mode: tiny_model(family=f, position_mode=m), id=f"{family}-{mode}")
    yield pytest.param(adapted_model, id="adapter")


@pytest.mark.parametrize("make", models())
def test_the_text_of_the_default_cache_in_one_graph(make, whole_graphs, caplog):
    """A second, shorter prompt fits the compiled steps of the first."""
    model, (compiled, graphs) = make(), whole_graphs
    for lengths in (LENGTHS, (80, 33)):
        expected, ours = generate(model, lengths), generate(model, lengths, **compiled)
        check_same(ours, expected)
        cache = ours.past_key_values
        assert type(cache) is SemTokenStaticCache
        assert cache.is_compressed
        assert torch.equal(cache.slot_lengths, expected.past_key_values.slot_lengths)
        assert cache.get_seq_length() == lengths[0] + NEW - 1
        # What the first prompt needed, not what its tokens would have.
        assert {layer.keys.shape[2] for layer in cache.layers} == {SLOTS + NEW - 1}
        assert cache.memory_bytes() >= expected.past_key_values.memory_bytes()
    assert graphs() == 1


@pytest.mark.parametrize(
    ("family", "window"), [("mistral", 16), ("mistral", SLOTS + 3), ("gemma3_text", SLOTS), ("gemma2", 64)]
)
def test_windows(family, window, whole_graphs):
    """Full before the prompt ends, with it, while decoding, never; compiled as often as plain Transformers does."""
    model = tiny_model(family=family, position_mode="compact", sliding_window=window)
    expected, (compiled, graphs) = generate(model), whole_graphs
    check_same(generate(model, **compiled), expected)
    assert graphs() <= 3


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 5, "num_return_sequences": 3},
        {"prefill_chunk_size": 7},
        {"guidance_scale": 1.7},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_searches(arguments):
    model = tiny_model()
    check_same(generate(model, **STATIC, **arguments), generate(model, **arguments))


def test_size():
    """`max_cache_len` leaves room; a plain prompt keeps what slots needed, never the length of a compressed one."""
    model = tiny_model()
    assert generate(model, **STATIC).past_key_values.max_columns == SLOTS + NEW - 1
    short = generate(model, (12,), **STATIC).past_key_values
    assert short.get_max_length() == SLOTS + NEW - 1
    assert generate(model, **STATIC, max_cache_len=200).past_key_values.max_columns == 200


def test_reset():
    """The columns serve a plain prompt."""
    model, ids = tiny_model(), random_ids(2, 20)
    cache = generate(model, **STATIC).past_key_values
    cache.reset()
    call = {"max_new_tokens": NEW, "do_sample": False, "compression": False}
    assert torch.equal(model.generate(ids, past_key_values=cache, **call), model.generate(ids, **call))


@pytest.mark.parametrize(("lengths", "call"), [((12,), {}), (LENGTHS, {"compression": False})], ids=["short", "off"])
def test_plain_calls_are_exact(lengths, call, caplog):
    model = tiny_model()
    ours = generate(model, lengths, target_ratio=None, **STATIC, **call)
    theirs = generate(plain_twin(model), lengths, target_ratio=None, **STATIC)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))
    assert warnings_of(caplog) == []


def test_other_attentions_are_plain(caplog):
    model = tiny_model(attn_implementation="semtoken_varlen")
    theirs = generate(plain_twin(tiny_model()), target_ratio=None, **STATIC)
    assert torch.equal(generate(model, **STATIC).sequences, theirs.sequences)
    (message,) = warnings_of(caplog)
    assert "a StaticCache that is offloaded or read by `semtoken_varlen` attention" in message


def test_embeddings_are_plain(caplog):
    model, call = tiny_model(), {**STATIC, "max_new_tokens": NEW, "do_sample": False}
    embeds = model.get_input_embeddings()(random_ids(1, 96))
    theirs = plain_twin(model).generate(inputs_embeds=embeds, **call)
    assert torch.equal(model.generate(inputs_embeds=embeds, **call), theirs)
    (message,) = warnings_of(caplog)
    assert "no token ids" in message


def test_recompress_every_says_that_it_has_no_effect(caplog):
    check_same(generate(tiny_model(recompress_every=12), **STATIC), generate(tiny_model()))
    (message,) = warnings_of(caplog)
    assert "`recompress_every` has no effect" in message


def test_a_further_turn(caplog):
    """Read plain, with one warning, where there is room and nothing is hidden; refused elsewhere."""
    model, texts = tiny_model(), []
    for arguments, again in (({}, {"compression": False}), ({**STATIC, "max_cache_len": 90}, {})):
        first = generate(model, **arguments)
        ids = torch.cat([first.sequences, random_ids(2, 30, 5)], 1)
        mask = torch.cat([ragged_prompts(LENGTHS)[1], torch.ones_like(ids[:, LENGTHS[0] :])], 1)
        call = {"past_key_values": first.past_key_values, "max_new_tokens": NEW, "do_sample": False}
        if arguments:
            with pytest.raises(ValueError, match="room for 154 tokens in all, and 333 may be needed"):
                model.generate(ids, attention_mask=mask, **{**call, "max_new_tokens": 200})
            hidden = mask.clone()
            hidden[0, LENGTHS[0] + 2] = 0
            with pytest.raises(ValueError, match="cannot hide tokens behind its prompt"):
                model.generate(ids, attention_mask=hidden, **call)
        texts.append(model.generate(ids, attention_mask=mask, **call, **again))
    assert torch.equal(*texts)
    (message,) = warnings_of(caplog)
    assert "a static cache holds the slots of the prompt that it was made for" in message


@pytest.mark.parametrize("lengths", [LENGTHS, (96,)], ids=["padded", "alone"])
def test_decoding_by_hand(lengths, whole_graphs):
    """A compiled forward needs neither mask nor positions."""
    model, prompt = tiny_model(), SemTokenCache()
    ids, mask = ragged_prompts(lengths)
    expected, step = generate(model, lengths), torch.compile(model.forward, fullgraph=True, backend="eager")
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, past_key_values=prompt, logits_to_keep=1, target_ratio=RATIO).logits
        cache, tokens = SemTokenStaticCache(model.config, prompt, 50), []
        with pytest.raises(ValueError, match="must cover the 96 tokens of the prompt"):
            model(ids[:, :1], attention_mask=mask, past_key_values=cache)
        for _ in range(NEW):
            tokens.append(logits[:, -1].index_fill(1, torch.tensor(2), -torch.inf).argmax(-1, keepdim=True))
            logits = step(tokens[-1], past_key_values=cache).logits
    assert torch.equal(torch.cat(tokens, 1), expected.sequences[:, 96:])
    assert whole_graphs[1]() == 1


@pytest.mark.parametrize("make", [tiny_model, adapted_model])
def test_a_plain_forward_compiles_whole(make, whole_graphs):
    """As plain Llama's does: nothing of SemToken breaks the graph of a call that it leaves alone."""
    model, ids = make(), random_ids(2, 64)
    step = torch.compile(model.forward, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(step(ids, compression=False).logits, model(ids, compression=False).logits)
