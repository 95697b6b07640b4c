import copy
import math

import pytest
import torch

from semtoken_hf.cache_bytes import cache_bytes
from semtoken_hf.evaluation.continuation import score_target
from semtoken_hf.evaluation.methods import METHODS, Compressed
from semtoken_hf.evaluation.methods.compressed import changed_fields
from semtoken_hf.evaluation.methods.selection import Selection, protected_tokens
from semtoken_hf.evaluation.prompts import Prompt
from semtoken_hf.evaluation.relevance import RELEVANCES
from tests.fixtures.adapted import adapted_model
from tests.fixtures.tiny import LLAMA, plain_twin, random_ids, tiny_model

LENGTH, TARGET = 160, 6
# Bytes of one slot: keys and values of every layer and head, float32.
SLOT = 2 * 4 * LLAMA["num_hidden_layers"] * LLAMA["num_key_value_heads"] * (64 // LLAMA["num_attention_heads"])
RATIOS = (2.0, 4.0, 30.0)
QUESTIONS = (0, 3, 12)


@pytest.fixture(scope="module")
def model():
    """Set up as the shipped checkpoint is, with a merger that changes what is read."""
    return merging_model()


def merging_model(**fields):
    defaults = {"segmentation_mode": "sentence", "max_span_length": 16}
    model = tiny_model(**{**defaults, "merge_mode": "learned", "merger_rank": 4, "min_prompt_length": 0, **fields})
    if model.model.learned_merger is not None:
        torch.nn.init.normal_(model.model.learned_merger.out_proj, std=0.3)
    return model


def prompt_of(question=12, name="p", seed=0, length=LENGTH):
    ids = random_ids(1, length + TARGET, seed)[0]
    none = torch.zeros(length, dtype=torch.bool)
    return Prompt(id=name, ids=ids[:length], question_length=question, target=ids[length:], answer=none)


def read(model, name, prompt, ratio=4.0):
    return METHODS[name].read(model, prompt, prompt.budget(ratio))


def state_of(model):
    base, encoder = model.base_model, model.base_model.semantic_encoder
    config = copy.deepcopy(model.config.to_dict())
    return config, id(base.learned_merger), encoder.radius, encoder.window, encoder.overlap


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_reads_within_the_budget(model, name, ratio, question):
    prompt, method = prompt_of(question), METHODS[name]
    before, random_state = state_of(model), torch.get_rng_state()
    prefill = read(model, name, prompt, ratio)
    # Nothing of the model has changed, and nobody else's random numbers.
    assert state_of(model) == before
    assert torch.equal(torch.get_rng_state(), random_state)

    budget, protected = prompt.budget(ratio), protected_tokens(model.config, prompt)
    if method.has_budget:
        # The fewest there can be: what is protected, and slots of at most `max_span_length` tokens for the rest.
        least, free = int(protected.sum()), int((~protected).sum())
        if isinstance(method, Compressed):
            least += math.ceil(free / method.fields.get("max_span_length", model.config.max_span_length))
        assert prefill.slots <= max(budget, least)
        assert prefill.slots >= 0.9 * budget
    # The cache really holds so many, in every layer.
    assert [layer.keys.shape[2] for layer in prefill.cache.layers] == [prefill.slots] * LLAMA["num_hidden_layers"]
    assert [layer.values.shape[2] for layer in prefill.cache.layers] == [prefill.slots] * LLAMA["num_hidden_layers"]
    assert cache_bytes(prefill.cache) == prefill.slots * SLOT

    assert prefill.kept.shape == (LENGTH,)
    assert prefill.kept.dtype == torch.bool
    assert prefill.kept[prompt.question].all()
    assert prefill.kept[protected].all()
    if isinstance(method, Selection):
        assert int(prefill.kept.sum()) == prefill.slots
    else:
        lengths = prefill.cache.slot_lengths[0]
        assert prefill.kept.tolist() == (lengths == 1).repeat_interleave(lengths).tolist()

    again = read(model, name, prompt, ratio)
    assert torch.equal(again.logits, prefill.logits)
    assert torch.equal(again.kept, prefill.kept)
    losses = score_target(model, prefill, prompt.target)
    assert losses.shape == (TARGET,)
    assert losses.isfinite().all()


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.has_budget])
def test_with_room_for_everything_every_method_is_the_full_context(model, name):
    prompt = prompt_of()
    full, prefill = read(model, "full", prompt), read(model, name, prompt, 1.0)
    assert prefill.slots == LENGTH
    assert prefill.kept.all()
    assert prefill.next_position == LENGTH
    torch.testing.assert_close(prefill.logits, full.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        score_target(model, prefill, prompt.target), score_target(model, full, prompt.target), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", METHODS)
def test_the_methods_differ(model, name):
    """No two entries of the registry read the same thing by mistake."""
    prompt = prompt_of()
    logits = read(model, name, prompt).logits
    # This checkpoint's merger is learned, and there is no chat in which a question could be found.
    same = {"semtoken", "semtoken_learned", "semtoken_unasked", *(f"semtoken_{part}" for part in RELEVANCES)}
    for other in METHODS:
        if other != name and not {name, other} <= same:
            assert not torch.allclose(read(model, other, prompt).logits, logits, atol=1e-5), (name, other)


def test_the_full_context_is_the_plain_model(model):
    prompt = prompt_of()
    full = read(model, "full", prompt)
    with torch.no_grad():
        logits = plain_twin(model)(prompt.ids[None]).logits[0, -1]
    torch.testing.assert_close(full.logits, logits, rtol=1e-4, atol=1e-4)
    assert (full.slots, full.next_position) == (LENGTH, LENGTH)
    assert full.kept.all()


@pytest.mark.parametrize("name", ["none", "truncation", "random", "self_information"])
def test_selected_tokens_are_read_at_their_own_positions(model, name):
    prompt = prompt_of()
    prefill = read(model, name, prompt)
    place = prefill.kept.nonzero().T
    # A mask of four dimensions, so that nothing is derived from the gaps.
    mask = torch.ones(place.shape[1], place.shape[1], dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        logits = plain_twin(model)(prompt.ids[place], position_ids=place, attention_mask=mask).logits[0, -1]
    torch.testing.assert_close(prefill.logits, logits, rtol=1e-4, atol=1e-4)
    assert prefill.next_position == LENGTH


@pytest.mark.parametrize("question", QUESTIONS)
def test_no_context_is_what_semtoken_protects(model, question):
    prompt = prompt_of(question)
    first, last = model.config.keep_first, max(model.config.keep_last, question)
    kept = read(model, "none", prompt).kept
    assert kept.nonzero().flatten().tolist() == [*range(first), *range(LENGTH - last, LENGTH)]
    # A budget of one slot leaves SemToken nothing but them, and spans of the longest length.
    tight = METHODS["semtoken"].read(model, prompt, 1)
    assert torch.equal(tight.kept, kept)


@pytest.mark.parametrize(("keep_last", "kept"), [(0, 1), (1, 1), (5, 5)])
def test_the_last_token_is_always_read(keep_last, kept):
    model = tiny_model(min_prompt_length=0, keep_first=0, keep_last=keep_last)
    prompt = prompt_of(question=0)
    assert read(model, "none", prompt).kept.nonzero().flatten().tolist() == list(range(LENGTH - kept, LENGTH))


@pytest.mark.parametrize("question", QUESTIONS)
def test_truncation_reads_the_ends(model, question):
    prompt = prompt_of(question)
    budget = prompt.budget(4.0)
    kept = read(model, "truncation", prompt).kept.nonzero().flatten().tolist()
    first = model.config.keep_first
    assert kept == [*range(first), *range(LENGTH - (budget - first), LENGTH)]


def test_random_dropping_is_another_sample_for_another_prompt(model):
    kept = {}
    for name in ("a", "b", "c"):
        kept[name] = read(model, "random", prompt_of(name=name)).kept
        assert torch.equal(kept[name], read(model, "random", prompt_of(name=name)).kept)
    assert len({tuple(k.tolist()) for k in kept.values()}) == 3
    # Uniform over the free tokens: 26 of 146 of them, neither at one end nor at the other.
    free = torch.stack(list(kept.values())).nonzero()[:, 1]
    free = free[(free >= 2) & (free < LENGTH - 12)]
    assert abs(free.double().mean().item() - 74) < 3 * 42 / len(free) ** 0.5


def test_self_information_keeps_the_most_surprising_tokens(model):
    prompt = prompt_of()
    with torch.no_grad():
        chances = plain_twin(model)(prompt.ids[None]).logits[0].double().softmax(-1)
    surprise = {t: -math.log(chances[t - 1, prompt.ids[t]]) for t in range(2, LENGTH - 12)}
    count = prompt.budget(4.0) - 2 - 12
    wanted = sorted(surprise, key=surprise.get)[-count:]
    kept = read(model, "self_information", prompt).kept.nonzero().flatten().tolist()
    assert kept == sorted([0, 1, *wanted, *range(LENGTH - 12, LENGTH)])


@pytest.mark.parametrize("name", METHODS)
def test_only_methods_with_an_encoder_use_it(model, name):
    calls = []
    handle = model.base_model.semantic_encoder.register_forward_hook(lambda *_: calls.append(1))
    read(model, name, prompt_of())
    handle.remove()
    method = METHODS[name]
    if isinstance(method, Selection):
        assert not calls
    else:  # to plan by, or for the merger to read
        is_uniform, is_bare = ("segmentation_mode", "uniform"), ("merge_mode", "mean")
        assert bool(calls) != ({is_uniform, is_bare} <= method.fields.items())


def test_a_method_says_why_a_checkpoint_cannot_be_read_so(model):
    for name, method in METHODS.items():
        reason = method.unfit(tiny_model(merge_mode="mean"))
        learned = isinstance(method, Compressed) and method.fields.get("merge_mode") == "learned"
        assert (reason == "the checkpoint has no learned merger; see scripts/adapt.py") == learned, name


@pytest.mark.parametrize("name", METHODS)
def test_the_checkpoint_s_own_fields_are_not_read_twice(name):
    fields = {} if isinstance(METHODS[name], Selection) else METHODS[name].fields
    reason = METHODS[name].unfit(merging_model(**fields))
    assert (reason is not None and "SemToken" in reason) == bool(fields)
    other = {"merge_mode": "mean", "query_weight": 1.5, "max_span_length": 7, "keep_first": 3}
    if fields.get("merge_mode") not in ("mean", "learned"):
        assert METHODS[name].unfit(merging_model(**other)) is None


def test_not_adapted_means_without_the_merger(model):
    prompt = prompt_of()
    plain = merging_model(merge_mode="mean")
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "learned_merger" not in k})
    for mode in ("mean", "representative"):
        plain.config.merge_mode = mode
        logits = read(plain, "semtoken", prompt).logits
        torch.testing.assert_close(read(model, f"semtoken_{mode}", prompt).logits, logits)
    assert not torch.allclose(read(model, "semtoken", prompt).logits, logits)


@pytest.mark.parametrize("name", ["semtoken_mean", "semtoken_representative"])
def test_an_adapted_checkpoint_is_not_read_as_if_it_were_not(name):
    """Its adapter acts on every merged row, so there is nothing to compare with."""
    assert "adapter" in METHODS[name].unfit(adapted_model(min_prompt_length=0))
    assert METHODS[name].unfit(merging_model()) is None


def test_without_a_budget_the_thresholds_decide(model):
    prompt = prompt_of()
    fields = {"segmentation_mode": "greedy", "max_kept_tokens": None}
    slots = []
    for tau in (0.7, 0.85, 0.95):
        method = Compressed("", False, {**fields, "similarity_threshold": tau})
        counts = {method.read(model, prompt, budget).slots for budget in (20, 80)}
        assert len(counts) == 1
        slots += counts
    assert slots[0] < slots[1] < slots[2]


def test_changed_fields_change_and_come_back(model):
    base, before = model.base_model, state_of(model)
    with changed_fields(model, encoder_window=32, encoder_overlap=4, fingerprint_radius=0, query_weight=3.0):
        encoder = base.semantic_encoder
        assert (encoder.window, encoder.overlap, encoder.radius, model.config.query_weight) == (32, 4, 0, 3.0)
        assert id(base.learned_merger) == before[1]
    assert state_of(model) == before
    with changed_fields(model, merge_mode="mean"):
        assert base.learned_merger is None
    with changed_fields(model, merge_mode="learned"):
        assert id(base.learned_merger) == before[1]
    assert state_of(model) == before


@pytest.mark.parametrize("fields", [{"merge_mode": "mean", "fingerprint_radius": 0}, {"encoder_window": 32}])
def test_changed_fields_come_back_after_an_exception(model, fields):
    before = state_of(model)
    with pytest.raises(RuntimeError, match="out of memory"), changed_fields(model, **fields):
        raise RuntimeError("out of memory")
    assert state_of(model) == before


def test_an_unknown_field_changes_nothing(model):
    before = state_of(model)
    with pytest.raises(AttributeError), changed_fields(model, query_weight=2.0, no_such_field=1):
        pass
    assert state_of(model) == before
