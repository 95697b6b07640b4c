import copy
import itertools
import math

import pytest
import torch

from semtoken_hf.cache_semtoken import cache_bytes
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
# Every method once, and two of them where there is little room and no question.
READINGS = [(name, 4.0, 12) for name in METHODS] + [("semtoken", 30.0, 0), ("truncation", 2.0, 3)]


@pytest.fixture(scope="module")
def model():
    """Set up as the shipped checkpoint is, with a merger that changes what is read."""
    return merging_model()


def merging_model(**fields):
    markers = {"sentence_ends": list(range(3, 30))}
    defaults = {"segmentation_mode": "sentence", "max_span_length": 16, "text_markers": markers}
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


@pytest.mark.parametrize(("name", "ratio", "question"), READINGS)
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


@pytest.mark.parametrize("name", ["truncation", "self_information", "semtoken", "semtoken_paper"])
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


def test_no_two_methods_read_the_same_thing_by_mistake(model):
    prompt = prompt_of()
    # This checkpoint's merger is learned, and there is no chat in which a question could be found.
    same = {
        "semtoken",
        "semtoken_learned",
        "semtoken_unasked",
        "semtoken_original",
        *(f"semtoken_{part}" for part in RELEVANCES),
    }
    logits = {name: read(model, name, prompt).logits for name in METHODS if name not in same - {"semtoken"}}
    for name, other in itertools.combinations(logits, 2):
        assert not torch.allclose(logits[name], logits[other], atol=1e-5), (name, other)


def test_the_checkpoint_s_own_fields_are_not_read_twice():
    for name, method in METHODS.items():
        fields = {} if isinstance(method, Selection) else method.fields
        reason = method.unfit(merging_model(**fields))
        assert (reason is not None and "SemToken" in reason) == bool(fields), name


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


def test_in_compact_positions_truncation_is_a_cut_prompt():
    model, prompt = merging_model(position_mode="compact"), prompt_of()
    prefill = read(model, "truncation", prompt)
    cut = prompt.ids[prefill.kept][None]
    with torch.no_grad():
        logits = plain_twin(model)(cut).logits[0, -1]
    torch.testing.assert_close(prefill.logits, logits, rtol=1e-4, atol=1e-4)
    assert prefill.next_position == prefill.slots == cut.shape[1]


@pytest.mark.parametrize("question", [0, 12])
def test_no_context_is_what_semtoken_protects(model, question):
    prompt = prompt_of(question)
    first, last = model.config.num_sink_tokens, max(model.config.recent_window, question)
    kept = read(model, "none", prompt).kept
    assert kept.nonzero().flatten().tolist() == [*range(first), *range(LENGTH - last, LENGTH)]
    # A budget of one slot leaves SemToken nothing but them, and spans of the longest length.
    tight = METHODS["semtoken"].read(model, prompt, 1)
    assert torch.equal(tight.kept, kept)


def test_truncation_reads_the_ends(model):
    prompt = prompt_of()
    budget = prompt.budget(4.0)
    kept = read(model, "truncation", prompt).kept.nonzero().flatten().tolist()
    first = model.config.num_sink_tokens
    assert kept == [*range(first), *range(LENGTH - (budget - first), LENGTH)]


def test_a_method_says_why_a_checkpoint_cannot_be_read_so(model):
    for name, method in METHODS.items():
        reason = method.unfit(tiny_model(merge_mode="mean"))
        learned = isinstance(method, Compressed) and method.fields.get("merge_mode") == "learned"
        assert (reason == "the checkpoint has no learned merger; see scripts/adapt.py") == learned, name


def test_not_adapted_means_without_the_merger(model):
    prompt = prompt_of()
    plain = merging_model(merge_mode="mean")
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "learned_merger" not in k})
    for mode in ("mean", "representative"):
        plain.config.merge_mode = mode
        logits = read(plain, "semtoken", prompt).logits
        torch.testing.assert_close(read(model, f"semtoken_{mode}", prompt).logits, logits)
    assert not torch.allclose(read(model, "semtoken", prompt).logits, logits)


def test_an_adapted_checkpoint_is_not_read_as_if_it_were_not():
    """Its adapter acts on every merged row, so there is nothing to compare with."""
    assert "adapter" in METHODS["semtoken_mean"].unfit(adapted_model(min_prompt_length=0))
    assert METHODS["semtoken_mean"].unfit(merging_model()) is None


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
