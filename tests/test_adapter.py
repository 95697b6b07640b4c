"""An adapter acts on compressed rows alone: everywhere else the model is bit for bit the one without it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from semtoken_hf import SemTokenLlamaForCausalLM
from semtoken_hf.adapter_semtoken import adapter_acts_on, has_adapter
from tests.fixtures.adapted import adapted_model, merge_by_hand
from tests.fixtures.tiny import LLAMA, ragged_prompts, random_ids

NEW_TOKENS = 5
# The second row is shorter than `min_prompt_length` and stays whole.
LENGTHS = (80, 12)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The adapted model, the same without its adapter, and the same with the adapter in its plain weights."""
    model, folder = adapted_model(), tmp_path_factory.mktemp("adapted")
    model.save_pretrained(folder)
    base, merged = (SemTokenLlamaForCausalLM.from_pretrained(folder, adapter_subfolder=None) for _ in range(2))
    merge_by_hand(merged, model)
    assert has_adapter(model)
    assert not has_adapter(base)
    # PyTorch chooses its matrix product by `requires_grad`, too, and products differ in the last bit.
    return tuple(m.requires_grad_(False) for m in (model, base, merged))


def generate(model, ids, mask=None, **arguments):
    mask = torch.ones_like(ids) if mask is None else mask
    tokens = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    outputs = model.generate(
        ids, attention_mask=mask, **tokens, return_dict_in_generate=True, output_logits=True, **arguments
    )
    return outputs.sequences, torch.stack(outputs.logits, dim=1), outputs


def test_uncompressed_calls_are_the_plain_model(models):
    model, _, _ = models
    plain = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval().requires_grad_(False)
    own = ("semantic_encoder", "learned_merger", ".lora_")
    state = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if not any(o in k for o in own)}
    plain.load_state_dict(state)
    ids, mask = ragged_prompts(LENGTHS)
    with torch.no_grad():
        for off in ({"compression": False}, {"target_ratio": 1}, {"logits_to_keep": 0}):
            ours, theirs = model(ids, attention_mask=mask, **off).logits, plain(ids, attention_mask=mask).logits
            assert torch.equal(ours, theirs)
        short = ids[1:, -LENGTHS[1] :]
        assert torch.equal(model(short, logits_to_keep=1).logits, plain(short, logits_to_keep=1).logits)
        states = model.model(ids, attention_mask=mask, compression=False).last_hidden_state
    assert torch.equal(states, plain.model(ids, attention_mask=mask).last_hidden_state)
    for search in ({}, {"num_beams": 3}):
        ours, our_logits, _ = generate(model, ids, mask, compression=False, **search)
        theirs, their_logits, _ = generate(plain, ids, mask, **search)
        assert torch.equal(ours, theirs)
        assert torch.equal(our_logits, their_logits)


@pytest.mark.parametrize("use_cache", [True, False])
def test_compressed_rows_are_read_through_the_adapter(models, use_cache):
    ids, mask = ragged_prompts((80, 60))
    with torch.no_grad():
        ours, base, merged = (m(ids, attention_mask=mask, logits_to_keep=3, use_cache=use_cache).logits for m in models)
    torch.testing.assert_close(ours, merged, **CLOSE)
    assert (ours - base).abs().max() > 0.1


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_whole_row_beside_a_compressed_one(models, use_cache):
    ids, mask = ragged_prompts(LENGTHS)
    with torch.no_grad():
        outputs = [m(ids, attention_mask=mask, logits_to_keep=2, use_cache=use_cache) for m in models]
    assert (outputs[0].compressed_lengths < torch.tensor(LENGTHS)).tolist() == [True, False]
    ours, base, merged = (o.logits for o in outputs)
    assert torch.equal(ours[1], base[1])
    assert not torch.allclose(ours[1], merged[1], **CLOSE)
    torch.testing.assert_close(ours[0], merged[0], **CLOSE)
    assert not torch.allclose(ours[0], base[0], **CLOSE)


@pytest.mark.parametrize("arguments", [{}, {"prefill_chunk_size": 7}], ids=["whole", "chunked"])
def test_every_step_on_a_compressed_cache_goes_through_the_adapter(models, arguments):
    """Each row, from its prompt to its last token, as the model that stands for it."""
    ids, mask = ragged_prompts(LENGTHS)
    ours, base, merged = (generate(m, ids, mask, **arguments) for m in models)
    assert torch.equal(ours[0][0], merged[0][0])
    torch.testing.assert_close(ours[1][0], merged[1][0], **CLOSE)
    assert torch.equal(ours[0][1], base[0][1])
    assert torch.equal(ours[1][1], base[1][1])
    assert all((base[1][0, step] - ours[1][0, step]).abs().max() > 0.1 for step in range(NEW_TOKENS))


def test_a_step_by_hand(models):
    """One token on a compressed cache, where `generate` does nothing for us."""
    model, _, merged = models
    ids, following = random_ids(1, 80), torch.tensor([[7]])
    with torch.no_grad():
        caches = [m(ids, logits_to_keep=1, use_cache=True).past_key_values for m in (model, merged)]
        ours, theirs = (m(following, past_key_values=c).logits for m, c in zip((model, merged), caches, strict=True))
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_beams(models):
    """Beams reorder the cache, and with it which rows are compressed."""
    ids, mask = ragged_prompts(LENGTHS)
    search = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    ours, base, merged = (generate(m, ids, mask, **search) for m in models)
    assert torch.equal(ours[0][:2], merged[0][:2])
    assert torch.equal(ours[0][2:], base[0][2:])
    torch.testing.assert_close(ours[2].sequences_scores[:2], merged[2].sequences_scores[:2], **CLOSE)
    assert not torch.allclose(ours[2].sequences_scores[:2], base[2].sequences_scores[:2], **CLOSE)
    torch.testing.assert_close(ours[2].sequences_scores[2:], base[2].sequences_scores[2:], **CLOSE)


def test_a_reordered_cache_takes_its_rows_along(models):
    model, base, merged = models
    ids, mask = ragged_prompts(LENGTHS)
    following, results = torch.tensor([[7], [7]]), []
    for m in (model, base, merged):
        with torch.no_grad():
            cache = m(ids, attention_mask=mask, logits_to_keep=1, use_cache=True).past_key_values
            cache.reorder_cache(torch.tensor([1, 0]))
            longer = torch.nn.functional.pad(mask.flip(0), (0, 1), value=1)
            results.append(m(following, attention_mask=longer, past_key_values=cache).logits)
    ours, whole, compressed = results
    assert torch.equal(ours[0], whole[0])
    torch.testing.assert_close(ours[1], compressed[1], **CLOSE)
    assert not torch.allclose(whole[1], compressed[1], **CLOSE)


def test_threads_do_not_disturb_each_other(models):
    """Two threads stand in the middle of one model at the same time, one with its rows compressed, one without."""
    model, ids = models[0], random_ids(1, 80)
    calls = [{"compression": True}, {"compression": False}]

    def run(arguments):
        with torch.no_grad():
            return model(ids, logits_to_keep=1, use_cache=False, **arguments).logits

    alone = [run(call) for call in calls]
    barrier = threading.Barrier(2, timeout=20)

    def meet(*_):
        barrier.wait()

    hooks = [layer.register_forward_pre_hook(meet) for layer in model.model.layers]
    try:
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(run, calls))
    finally:
        for hook in hooks:
            hook.remove()
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(alone[0], alone[1], **CLOSE)


def test_the_gate_is_closed_behind_a_call_that_fails(models):
    model, base, _ = models
    ids = random_ids(1, 80)
    with pytest.raises(ValueError, match="target_ratio"), torch.no_grad():
        model(ids, logits_to_keep=1, target_ratio=0.5)

    def fail(*_):
        raise RuntimeError("stop here")

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop here"), torch.no_grad():
        model(ids, logits_to_keep=1)
    hook.remove()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base(ids).logits)


@pytest.mark.parametrize("rows", [None, True])
def test_all_rows_by_hand(models, rows):
    """Outside the model's own calls the layers act on all rows, or as they are told."""
    model, _, merged = models
    layer, plain = model.model.layers[0].mlp.up_proj, merged.model.layers[0].mlp.up_proj
    states = torch.randn(2, 3, LLAMA["hidden_size"])
    with torch.no_grad(), adapter_acts_on(rows):
        torch.testing.assert_close(layer(states), plain(states), **CLOSE)
        with adapter_acts_on(torch.tensor([False, True])):
            mixed = layer(states)
        torch.testing.assert_close(layer(states), plain(states), **CLOSE)
    assert torch.equal(mixed[0], layer.base_layer(states)[0])
    torch.testing.assert_close(mixed[1], plain(states)[1], **CLOSE)


def adapter_gradients(model, row: int, **arguments):
    ids, mask = ragged_prompts(LENGTHS)
    model.zero_grad()
    outputs = model(ids, attention_mask=mask, logits_to_keep=2, **arguments)
    outputs.logits[row].square().mean().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and ".lora_" in n}
    model.zero_grad()
    return outputs.logits.detach(), gradients


@pytest.mark.parametrize("is_training", [True, False])
def test_only_compressed_rows_train_the_adapter(is_training):
    model = adapted_model().train(is_training)
    ids, mask = ragged_prompts(LENGTHS)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, logits_to_keep=2).logits
    logits, compressed = adapter_gradients(model, 0)
    assert torch.equal(logits, expected)
    assert len(compressed) == 2 * 2 * 7
    assert all(g.any() for g in compressed.values())
    _, whole = adapter_gradients(model, 1)
    assert not any(g.any() for g in whole.values())
    _, off = adapter_gradients(model.requires_grad_(True), 0, compression=False)
    assert not off


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_layers_see_the_same_rows(use_reentrant):
    """Gradient checkpointing runs the layers again in the backward pass, outside the model's own call."""
    model = adapted_model().train().requires_grad_(True)
    _, expected = adapter_gradients(model, 1, use_cache=False)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    _, ours = adapter_gradients(model, 1, use_cache=False)
    assert expected.keys() == ours.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, **CLOSE)
