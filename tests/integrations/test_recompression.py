"""`recompress_every`: generated text is read again into merged slots, and the books stay right."""

import copy
import math

import pytest
import torch
from transformers import GenerationConfig

from semtoken_hf import SemTokenCache
from tests.fixtures.tiny import left_padded, plain_twin, random_ids, tiny_model

EVERY, RECENT_WINDOW, RATIO = 20, 4, 2.5
MERGED = math.ceil(EVERY / RATIO)
PROMPT, STEPS = 60, 100
CLOSE = {"atol": 2e-5, "rtol": 1e-5}
FIELDS = {"recompress_every": EVERY, "recent_window": RECENT_WINDOW, "target_ratio": RATIO, "min_prompt_length": 16}


@pytest.fixture(scope="module", params=["original", "compact"])
def model(request):
    return tiny_model(position_mode=request.param, **FIELDS)


def generate(model, ids, steps=STEPS, **arguments):
    arguments = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, **arguments}
    return model.generate(ids, return_dict_in_generate=True, output_logits=True, **arguments)


def by_hand(model, ids, steps=STEPS):
    """Greedy decoding with `forward` alone: crop what was generated, read it again, keep the books on paper."""
    cache, mask = SemTokenCache(config=model.config), torch.ones_like(ids)
    logits, start, column, text = [], ids.shape[1], ids, ids
    for _ in range(steps):
        ratio = None
        whole = cache.get_seq_length() - start
        if cache.slot_lengths is not None and whole == EVERY + RECENT_WINDOW - 1:
            cache.crop(-whole)
            column = text[:, -whole - 1 :]
            ratio = (whole + 1) / (MERGED + RECENT_WINDOW)
            start += EVERY
        mask = torch.ones_like(text)
        with torch.no_grad():
            out = model(column, attention_mask=mask, past_key_values=cache, logits_to_keep=1, target_ratio=ratio)
        logits.append(out.logits[:, -1].clone())
        out.logits[:, -1, model.config.eos_token_id] = -torch.inf
        column = out.logits[:, -1].argmax(-1, keepdim=True)
        text = torch.cat([text, column], dim=1)
    return text, cache, torch.stack(logits)


def test_generate_is_decoding_by_hand(model):
    ids = random_ids(1, PROMPT)
    outputs = generate(model, ids)
    text, cache, logits = by_hand(model, ids)
    assert torch.equal(outputs.sequences, text)
    torch.testing.assert_close(torch.stack(outputs.logits), logits, **CLOSE)
    assert torch.equal(outputs.past_key_values.slot_lengths, cache.slot_lengths)
    for ours, theirs in zip(outputs.past_key_values.layers, cache.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, **CLOSE)
        torch.testing.assert_close(ours.values, theirs.values, **CLOSE)


@pytest.mark.parametrize(
    "steps", [EVERY + RECENT_WINDOW, EVERY + RECENT_WINDOW + 1, 3 * EVERY + RECENT_WINDOW + 1, STEPS]
)
def test_the_cache_grows_at_one_over_the_ratio(model, steps):
    cache = generate(model, random_ids(1, PROMPT), steps).past_key_values
    in_cache = steps - 1
    times = max((in_cache - RECENT_WINDOW) // EVERY, 0)
    prompt = math.ceil(PROMPT / RATIO)
    assert cache.compressed_lengths.tolist() == [prompt + times * MERGED + in_cache - times * EVERY]
    assert cache.physical_length() == cache.slot_lengths.shape[1] == cache.layers[0].keys.shape[2]
    assert cache.original_lengths.tolist() == [PROMPT + in_cache]
    assert cache.get_seq_length() == PROMPT + in_cache
    # The recent window is whole, and what is merged lies wholly before it.
    assert (cache.slot_lengths[:, -RECENT_WINDOW:] == 1).all()
    assert int((cache.slot_lengths[0, prompt:] > 1).sum()) >= times


def test_the_slots_of_the_prompt_stay_bit_identical(model):
    ids = random_ids(1, PROMPT)
    slots = math.ceil(PROMPT / RATIO)
    short, long = (generate(model, ids, steps).past_key_values for steps in (2, STEPS))
    assert torch.equal(long.slot_lengths[:, :slots], short.slot_lengths[:, :slots])
    for ours, theirs in zip(long.layers, short.layers, strict=True):
        assert torch.equal(ours.keys[:, :, :slots], theirs.keys[:, :, :slots])
        assert torch.equal(ours.values[:, :, :slots], theirs.values[:, :, :slots])


def test_merged_slots_come_from_the_stage(model):
    """The slots that replace generated tokens are those of `compress` on these tokens, not means of old keys."""
    ids = random_ids(1, PROMPT)
    outputs = generate(model, ids, EVERY + RECENT_WINDOW + 1)
    cache, slots = outputs.past_key_values, math.ceil(PROMPT / RATIO)
    again = outputs.sequences[:, PROMPT : PROMPT + EVERY + RECENT_WINDOW]
    before = SemTokenCache(config=model.config)
    model(ids, past_key_values=before, logits_to_keep=1)
    prompt = model.compress(again, target_ratio=again.shape[1] / (MERGED + RECENT_WINDOW), past_key_values=before)
    assert torch.equal(cache.slot_lengths[:, slots:], prompt.slot_lengths)
    model.model(
        inputs_embeds=prompt.inputs_embeds, position_ids=prompt.position_ids, past_key_values=before, use_cache=True
    )
    torch.testing.assert_close(before.layers[1].keys, cache.layers[1].keys, **CLOSE)


def test_rows_are_those_of_single_prompts(model):
    rows = [random_ids(1, n, n)[0] for n in (PROMPT, 31, 9)]
    ids, mask = left_padded(rows)
    together = generate(model, ids, attention_mask=mask)
    for row, prompt in enumerate(rows):
        alone = generate(model, prompt[None])
        assert torch.equal(together.sequences[row, ids.shape[1] :], alone.sequences[0, len(prompt) :])
        for key in ("original_lengths", "compressed_lengths"):
            ours, theirs = getattr(together.past_key_values, key)[row], getattr(alone.past_key_values, key)[0]
            assert ours == theirs
        for ours, theirs in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(ours[row], theirs[0], **CLOSE)


def test_finished_rows_hold_no_slots_back(model):
    """What fills up a finished row is left out of the cache, and the others do not notice."""
    rows = [random_ids(1, PROMPT, seed)[0] for seed in range(3)]
    alone = [generate(model, row[None]).sequences[0, PROMPT:] for row in rows]
    # An end that the first row meets early and the others never.
    ends = [t for t in alone[0][:15].tolist() if all(t not in other.tolist() for other in alone[1:])]
    assert ends
    outputs = generate(model, torch.stack(rows), eos_token_id=ends[:1], min_new_tokens=0)
    for row in (1, 2):
        assert torch.equal(outputs.sequences[row, PROMPT:], alone[row])
    cache = outputs.past_key_values
    assert cache.physical_length() == int(cache.compressed_lengths[1])
    assert cache.compressed_lengths[0] < cache.compressed_lengths[1]


def test_beams_and_sampling(model):
    ids = torch.cat([random_ids(1, PROMPT, 1), random_ids(1, PROMPT, 2)])
    outputs = generate(model, ids, num_beams=3)
    for row in range(2):
        alone = generate(model, ids[row : row + 1], num_beams=3)
        assert torch.equal(outputs.sequences[row], alone.sequences[0])
    times = (STEPS - 1 - RECENT_WINDOW) // EVERY
    assert outputs.past_key_values.physical_length() == math.ceil(PROMPT / RATIO) + STEPS - 1 - times * (EVERY - MERGED)
    torch.manual_seed(0)
    sampled = generate(model, ids, do_sample=True)
    assert sampled.past_key_values.physical_length() == outputs.past_key_values.physical_length()


def test_drafts(model):
    """Prompt lookup reads several tokens a step: the same text; what is read again ends before the drafts."""
    ids = random_ids(1, 12).repeat(1, 5)
    plain = generate(model, ids, prompt_lookup_num_tokens=None)
    drafted = generate(model, ids, prompt_lookup_num_tokens=3)
    cache = drafted.past_key_values
    assert cache.original_lengths.tolist() == [drafted.sequences.shape[1] - 1]
    assert cache.physical_length() <= plain.past_key_values.physical_length() + EVERY + 4
    assert cache.get_seq_length() - cache.generated.start < EVERY + RECENT_WINDOW + 4
    assert torch.equal(drafted.sequences[:, : 60 + EVERY], plain.sequences[:, : 60 + EVERY])


def test_turns(model):
    """A chat: each turn's text and its long answer are merged, and the next turn goes on."""
    cache = SemTokenCache(config=model.config)
    ids = random_ids(1, PROMPT)
    for turn in range(3):
        if turn:
            ids = torch.cat([ids, random_ids(1, 41, turn)[:, 1:]], dim=1)
        held = None if not turn else (cache.physical_length(), copy.deepcopy(cache.layers[0].keys))
        ids = generate(model, ids, 50, past_key_values=cache).sequences
        if held:
            assert torch.equal(cache.layers[0].keys[:, :, : held[0]], held[1])
        assert cache.original_lengths.tolist() == [ids.shape[1] - 1]
        assert cache.generated.start < ids.shape[1] - 1
    assert cache.physical_length() < ids.shape[1] / 1.8


@pytest.mark.parametrize("arguments", [{"compression": False}, {"target_ratio": 1}])
def test_off_is_exact(model, arguments):
    ids = random_ids(1, PROMPT)
    ours, theirs = generate(model, ids, **arguments), generate(plain_twin(model), ids)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))


def test_off_by_default():
    model = tiny_model(**{**FIELDS, "recompress_every": None})
    assert tiny_model().config.recompress_every is None
    cache = generate(model, random_ids(1, PROMPT)).past_key_values
    assert cache.physical_length() == math.ceil(PROMPT / RATIO) + STEPS - 1


@pytest.mark.parametrize("every", [0, -1, 2.0, True, "8"])
def test_refused(every):
    with pytest.raises(ValueError, match="`recompress_every` must be an integer >= 1 or None"):
        tiny_model(recompress_every=every)


def test_too_short_to_merge():
    with pytest.raises(ValueError, match="at least min_prompt_length - recent_window = 12"):
        tiny_model(recompress_every=11)
    assert tiny_model(recompress_every=12).config.recompress_every == 12


def test_a_field_that_is_set_later():
    """With others that are set, it would never merge anything."""
    model = tiny_model(**FIELDS)
    model.config.recompress_every = 11
    with pytest.raises(ValueError, match="at least min_prompt_length - recent_window"):
        generate(model, random_ids(1, PROMPT), 4)
    assert generate(model, random_ids(1, PROMPT), 4, compression=False).sequences.shape[1] == PROMPT + 4


@pytest.mark.parametrize("name", ["protected_mask", "query_mask", "span_ids"])
def test_masks_of_the_prompt_stay_with_it(model, name):
    """Also where it is as long as what is read again."""
    ids = random_ids(1, EVERY + RECENT_WINDOW)
    values = model.compress(ids).span_ids if name == "span_ids" else torch.ones_like(ids)
    cache = generate(model, ids, EVERY + RECENT_WINDOW + 1, **{name: values}).past_key_values
    prompt = int(values.max()) + 1 if name == "span_ids" else ids.shape[1]
    assert cache.compressed_lengths.tolist() == [prompt + MERGED + RECENT_WINDOW]
    ratio = (EVERY + RECENT_WINDOW) / (MERGED + RECENT_WINDOW)
    again = generate(model, ids, EVERY + RECENT_WINDOW + 1, **{name: values}).sequences[:, ids.shape[1] : -1]
    assert torch.equal(
        cache.slot_lengths[:, prompt:], model.compress(again, target_ratio=ratio, past_key_values=cache).slot_lengths
    )


def test_sliding_windows():
    """The window forgets old slots; what is read again is brought back first."""
    model = tiny_model(family="mistral", sliding_window=30, **FIELDS)
    outputs = generate(model, random_ids(1, PROMPT))
    text, cache, logits = by_hand_with_recording(model, random_ids(1, PROMPT))
    assert torch.equal(outputs.sequences, text)
    torch.testing.assert_close(torch.stack(outputs.logits), logits, **CLOSE)
    assert outputs.past_key_values.physical_length() == cache.physical_length()


def by_hand_with_recording(model, ids):
    original = SemTokenCache.__init__

    def recording(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.activate_past_recording()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SemTokenCache, "__init__", recording)
        return by_hand(model, ids)


def test_a_generation_config_of_another_length(model):
    """`generate` copies its configuration; nothing of a call stays behind for the next one."""
    ids = random_ids(1, PROMPT)
    first = generate(model, ids).sequences
    generate(model, ids, generation_config=GenerationConfig(num_beams=2))
    assert torch.equal(generate(model, ids).sequences, first)
