import copy
import math

import pytest
import torch

from semtoken_hf.cache_semtoken import cache_bytes
from semtoken_hf.evaluation.continuation import decode_greedily, score_target
from semtoken_hf.evaluation.methods import METHODS
from semtoken_hf.evaluation.methods.compressed import changed_fields
from semtoken_hf.evaluation.prompts import Prompt
from tests.fixtures.tiny import LLAMA, plain_twin, random_ids, tiny_model

LENGTH, RATIO, NEW = 90, 2.5, 14


@pytest.fixture(scope="module")
def model():
    return tiny_model(min_prompt_length=0)


def prompt_of(seed=0, question=9, target=8):
    ids = random_ids(1, LENGTH + target, seed)[0]
    none = torch.zeros(LENGTH, dtype=torch.bool)
    return Prompt(id=f"p{seed}", ids=ids[:LENGTH], question_length=question, target=ids[LENGTH:], answer=none)


def read(model, prompt, variant="full"):
    return METHODS[variant].read(model, prompt, prompt.budget(RATIO))


def never(ids):
    return False


def labels_of(prompt):
    ids = torch.cat([prompt.ids, prompt.target])[None]
    labels = ids.clone()
    labels[:, : prompt.length] = -100
    return ids, labels


@pytest.mark.parametrize("target", [1, 12])
def test_the_score_is_the_plain_model_s_loss(model, target):
    prompt = prompt_of(target=target)
    nll = score_target(model, read(model, prompt), prompt.target)
    ids, labels = labels_of(prompt)
    with torch.no_grad():
        logits = plain_twin(model)(ids).logits[0]
    wanted = -logits.double().log_softmax(-1)[torch.arange(LENGTH - 1, LENGTH + target - 1), prompt.target]
    assert nll.dtype == torch.float64
    torch.testing.assert_close(nll, wanted, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert nll.mean().item() == pytest.approx(plain_twin(model)(ids, labels=labels).loss.item(), rel=1e-4)


@pytest.mark.parametrize("mode", ["original", "compact"])
def test_the_score_behind_merged_slots_is_the_model_s_loss(model, mode):
    # Law 3 makes it so: the plan of the prompt knows nothing of what is scored behind it.
    prompt = prompt_of(question=0, target=12)
    method = METHODS["semtoken" if mode == "original" else "semtoken_compact"]
    prefill = method.read(model, prompt, prompt.budget(RATIO))
    assert prefill.slots == math.ceil(LENGTH / RATIO)
    assert prefill.next_position == (LENGTH if mode == "original" else prefill.slots)
    ids, labels = labels_of(prompt)
    with torch.no_grad(), changed_fields(model, position_mode=mode):
        wanted = model(ids, labels=labels, target_ratio=RATIO).loss
    nll = score_target(model, prefill, prompt.target)
    assert nll.mean().item() == pytest.approx(wanted.item(), rel=1e-4)
    other = score_target(model, read(model, prompt), prompt.target)
    assert nll.mean().item() != pytest.approx(other.mean().item(), rel=1e-3)


@pytest.mark.parametrize("variant", ["full", "semtoken_compact"])
def test_scoring_leaves_the_cache_as_it_was(model, variant):
    prompt = prompt_of()
    prefill = read(model, prompt, variant)
    before = copy.deepcopy(prefill.cache)
    first = score_target(model, prefill, prompt.target)
    assert len(prefill.cache.layers) == LLAMA["num_hidden_layers"]
    for layer, old in zip(prefill.cache.layers, before.layers, strict=True):
        assert torch.equal(layer.keys, old.keys)
        assert torch.equal(layer.values, old.values)
    assert prefill.cache.get_seq_length() == before.get_seq_length()
    assert torch.equal(first, score_target(model, prefill, prompt.target))


@pytest.mark.parametrize("variant", ["full", "truncation", "semtoken"])
def test_an_answer_after_scoring_is_the_same_answer(model, variant):
    prompt = prompt_of(seed=1)
    fresh, scored = read(model, prompt, variant), read(model, prompt, variant)
    score_target(model, scored, prompt.target)
    answer = decode_greedily(model, fresh, NEW, never)
    assert decode_greedily(model, scored, NEW, never) == answer
    assert len(set(answer)) > 3  # else the model only repeats itself and the test says little


def test_decoding_the_full_context_is_generate(model):
    prompt = prompt_of()
    answer = decode_greedily(model, read(model, prompt), NEW, lambda ids: ids[-1] == LLAMA["eos_token_id"])
    out = plain_twin(model).generate(prompt.ids[None], do_sample=False, max_new_tokens=NEW)
    assert answer == out[0, LENGTH:].tolist()


@pytest.mark.parametrize(("mode", "budget"), [("original", "max_slots"), ("compact", "target_ratio")])
def test_decoding_behind_merged_slots_is_generate(model, mode, budget):
    prompt = prompt_of()
    prefill = read(model, prompt, "semtoken" if mode == "original" else "semtoken_compact")
    answer = decode_greedily(model, prefill, NEW, lambda ids: ids[-1] == LLAMA["eos_token_id"])
    fields = {"target_ratio": RATIO} if budget == "target_ratio" else {"max_slots": prompt.budget(RATIO)}
    with changed_fields(model, position_mode=mode, **{"target_ratio": 1.0, **fields}):
        out = model.generate(
            prompt.ids[None], do_sample=False, max_new_tokens=NEW, protected_mask=prompt.question[None]
        )
    assert answer == out[0, LENGTH:].tolist()
    assert answer != decode_greedily(model, read(model, prompt), NEW, never)[: len(answer)]


def test_no_answer_is_longer_than_allowed(model):
    prompt = prompt_of()
    whole = decode_greedily(model, read(model, prompt), 6, never)
    assert decode_greedily(model, read(model, prompt), 3, never) == whole[:3]


@pytest.mark.parametrize("variant", ["full", "semtoken"])
def test_bytes_are_those_of_the_slots(model, variant):
    prefill = read(model, prompt_of(), variant)
    assert prefill.slots == (LENGTH if variant == "full" else math.ceil(LENGTH / RATIO))
    heads, width = LLAMA["num_key_value_heads"], LLAMA["hidden_size"] // LLAMA["num_attention_heads"]
    assert cache_bytes(prefill.cache) == 2 * LLAMA["num_hidden_layers"] * heads * width * 4 * prefill.slots


@pytest.mark.parametrize("variant", ["full", "semtoken"])
def test_scoring_with_a_sliding_window(variant):
    """The window holds fewer positions than the prompt; what scoring pushes out of it comes back."""
    model = tiny_model(family="mistral", sliding_window=24, min_prompt_length=0)
    prompt = prompt_of()
    prefill = read(model, prompt, variant)
    nll = score_target(model, prefill, prompt.target)
    assert torch.equal(score_target(model, prefill, prompt.target), nll)
    if variant == "full":
        ids, labels = labels_of(prompt)
        assert nll.mean().item() == pytest.approx(plain_twin(model)(ids, labels=labels).loss.item(), rel=1e-4)
