"""Row by row, what `generate` offers: compressed and equal to decoding by hand, or exactly plain with one warning."""

import functools

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    cache_utils,
)
from transformers.generation.streamers import BaseStreamer

from semtoken_hf import SemTokenCache
from semtoken_hf.cache_semtoken import cache_bytes
from tests.fixtures.logs import warnings_of
from tests.fixtures.tiny import FEW, left_padded, plain_twin, ragged_prompts, random_ids, tiny_model

CLOSE = {"atol": 2e-5, "rtol": 1e-5}
STEPS = 8
LENGTHS = (96, 41)


@functools.cache
def model_of(family, mode):
    return tiny_model(family=family, position_mode=mode)


@pytest.fixture(params=[("llama", "original"), ("llama", "compact"), ("gpt_neox", "original")], ids="-".join)
def model(request):
    return model_of(*request.param)


@pytest.fixture
def compressions(monkeypatch):
    """Rows of every call of the stage."""
    calls = []
    for family in FEW:
        cls = type(model_of(family, "original"))
        original = cls.compress

        def compress(self, input_ids, *args, original=original, **kwargs):
            calls.append(len(input_ids))
            return original(self, input_ids, *args, **kwargs)

        monkeypatch.setattr(cls, "compress", compress)
    return calls


def generate(model, ids, mask=None, **arguments):
    mask = torch.ones_like(ids) if mask is None else mask
    arguments = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, **arguments}
    return model.generate(ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **arguments)


def decode_by_hand(model, ids, mask, choose, **arguments):
    """Prefill and decoding with `forward` alone; `choose`: logits [B, V] -> next tokens [B]."""
    cache, column, tokens = SemTokenCache(config=model.config), ids, []
    for _ in range(STEPS):
        with torch.no_grad():
            out = model(column, attention_mask=mask, past_key_values=cache, logits_to_keep=1, **arguments)
        logits = out.logits[:, -1].float()
        logits[:, model.config.eos_token_id] = -torch.inf
        tokens.append(choose(logits))
        column = tokens[-1][:, None]
        mask = torch.cat([mask, torch.ones_like(column)], dim=1)
    return torch.stack(tokens, dim=1), cache


def draw(logits):
    return torch.multinomial((logits / 0.7).softmax(-1), 1).squeeze(1)


CHOICES = {"greedy": ({}, lambda logits: logits.argmax(-1)), "sampling": ({"do_sample": True, "top_k": 0}, draw)}


@pytest.mark.parametrize("ratio", [2.4, 4.0])
@pytest.mark.parametrize("choice", CHOICES)
def test_greedy_and_seeded_sampling_are_decoding_by_hand(model, choice, ratio):
    ids, mask = ragged_prompts(LENGTHS)
    arguments, choose = CHOICES[choice]
    if choice == "sampling":
        arguments = {**arguments, "temperature": 0.7}
    torch.manual_seed(5)
    outputs = generate(model, ids, mask, target_ratio=ratio, **arguments)
    torch.manual_seed(5)
    tokens, cache = decode_by_hand(model, ids, mask, choose, target_ratio=ratio)
    assert torch.equal(outputs.sequences[:, ids.shape[1] :], tokens)
    assert torch.equal(outputs.past_key_values.slot_lengths, cache.slot_lengths[:, : ids.shape[1] + STEPS - 1])
    assert cache.is_compressed


@pytest.mark.parametrize(
    ("arguments", "copies"),
    [
        ({"num_beams": 4}, 4),
        ({"num_beams": 3, "num_return_sequences": 2}, 3),
        ({"do_sample": True, "num_return_sequences": 3}, 3),
        ({"num_beams": 2, "do_sample": True}, 2),
        ({"num_beams": 3, "prefill_chunk_size": 7}, 3),
    ],
)
def test_a_prompt_is_planned_and_read_once(model, compressions, monkeypatch, arguments, copies):
    """Beams and returns: the stage sees each prompt once, and what comes out is as if it had seen the copies."""
    ids, mask = ragged_prompts(LENGTHS)
    torch.manual_seed(1)
    outputs = generate(model, ids, mask, output_scores=True, **arguments)
    assert compressions == [len(LENGTHS)]
    monkeypatch.setattr(type(model), "_reads_copies_once", lambda *_: False)
    torch.manual_seed(1)
    copied = generate(model, ids, mask, output_scores=True, **arguments)
    assert compressions == [len(LENGTHS), len(LENGTHS) * copies]
    assert torch.equal(outputs.sequences, copied.sequences)
    for ours, theirs in zip(outputs.scores, copied.scores, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    assert torch.equal(outputs.past_key_values.slot_lengths, copied.past_key_values.slot_lengths)
    for ours, theirs in zip(outputs.past_key_values.layers, copied.past_key_values.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, **CLOSE)


def test_what_is_given_for_the_prompt_follows_the_copies(model):
    ids, mask = ragged_prompts(LENGTHS)
    given = {"protected_mask": (torch.arange(96) % 9 == 5).long().expand(2, -1), "query_mask": torch.zeros_like(ids)}
    together = generate(model, ids, mask, num_beams=3, **given)
    for row, n in enumerate(LENGTHS):
        own = {name: value[row : row + 1, -n:] for name, value in given.items()}
        alone = generate(model, ids[row : row + 1, -n:], num_beams=3, **own)
        assert torch.equal(together.sequences[row, 96:], alone.sequences[0, n:])
    assert not torch.equal(together.sequences, generate(model, ids, mask, num_beams=3).sequences)


def test_copies_carry_states_and_attentions():
    model = tiny_model(attn_implementation="eager")
    ids, mask = ragged_prompts(LENGTHS)
    outputs = generate(
        model, ids, mask, do_sample=True, num_return_sequences=2, output_hidden_states=True, output_attentions=True
    )
    slots = outputs.past_key_values.physical_length() - STEPS + 1
    assert {tuple(s.shape[:2]) for s in outputs.hidden_states[0]} == {(4, slots)}
    assert {tuple(a.shape) for a in outputs.attentions[0]} == {(4, 4, slots, slots)}
    assert torch.equal(outputs.hidden_states[0][-1][0], outputs.hidden_states[0][-1][1])


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
def test_span_ids_say_whose_state_each_is(model, arguments):
    """Row by row of the states of the prompt; none where nothing merged."""
    ids, mask = ragged_prompts(LENGTHS)
    outputs = generate(model, ids, mask, output_hidden_states=True, **arguments)
    rows = len(ids) * (2 if arguments else 1)
    states, spans = outputs.hidden_states[0][0], outputs["span_ids"]
    assert (len(states), tuple(spans.shape)) == (rows, (rows, ids.shape[1]))
    prompt = model.compress(ids, mask)
    assert torch.equal(spans, prompt.span_ids.repeat_interleave(rows // len(ids), 0))
    # The last token is whole: its column is its embedding.
    columns = states.shape[1] - spans.amax(1, keepdim=True) - 1 + spans
    embeddings = model.get_input_embeddings()(ids).repeat_interleave(rows // len(ids), 0)
    torch.testing.assert_close(states[torch.arange(rows), columns[:, -1]], embeddings[:, -1])
    assert "span_ids" not in generate(model, ids, mask, compression=False, **arguments)


@pytest.mark.parametrize("negative", [(70, 33), (9, 5), None], ids=["long", "short", "none"])
def test_guidance(model, compressions, negative):
    """Classifier-free guidance: the negative prompt is compressed like the prompt, or read whole if it is short."""
    ids, mask = ragged_prompts(LENGTHS)
    given = {}
    if negative:
        rows = [random_ids(1, n, 7 + n)[0] for n in negative]
        given["negative_prompt_ids"], given["negative_prompt_attention_mask"] = left_padded(rows)
    outputs = generate(model, ids, mask, guidance_scale=1.7, target_ratio=3.0, output_scores=True, **given)
    assert compressions == [2, 2] if negative == (70, 33) else [2]
    other = given.get("negative_prompt_ids", ids[:, -1:])
    other_mask = given.get("negative_prompt_attention_mask", torch.ones_like(other))
    states = [(ids, mask, SemTokenCache(config=model.config)), (other, other_mask, SemTokenCache(config=model.config))]
    for step in range(STEPS):
        logits = []
        for number, (column, seen, cache) in enumerate(states):
            with torch.no_grad():
                out = model(column, attention_mask=seen, past_key_values=cache, logits_to_keep=1, target_ratio=3.0)
            logits.append(out.logits[:, -1].log_softmax(-1))
            states[number] = (column, seen, cache)
        guided = 1.7 * (logits[0] - logits[1]) + logits[1]
        guided[:, model.config.eos_token_id] = -torch.inf
        torch.testing.assert_close(outputs.scores[step], guided, atol=1e-4, rtol=1e-4)
        token = guided.argmax(-1, keepdim=True)
        assert torch.equal(outputs.sequences[:, ids.shape[1] + step], token[:, 0])
        states = [(token, torch.cat([seen, torch.ones_like(token)], dim=1), cache) for _, seen, cache in states]


def test_guidance_off_is_exact(model):
    ids, mask = ragged_prompts(LENGTHS)
    negative, negative_mask = ragged_prompts((70, 33), seed=9)
    given = {"negative_prompt_ids": negative, "negative_prompt_attention_mask": negative_mask, "guidance_scale": 1.7}
    ours = generate(model, ids, mask, compression=False, **given)
    theirs = generate(plain_twin(model), ids, mask, **given)
    assert torch.equal(ours.sequences, theirs.sequences)


def test_constrained_decoding(model):
    ids, mask = ragged_prompts(LENGTHS)
    allowed = list(range(40, 60))
    for search in ({}, {"num_beams": 3}):
        outputs = generate(model, ids, mask, prefix_allowed_tokens_fn=lambda *_: allowed, **search)
        assert set(outputs.sequences[:, 96:].flatten().tolist()) <= set(allowed)
        assert outputs.past_key_values.is_compressed


@pytest.mark.parametrize(
    "arguments", [{"num_beam_groups": 2, "num_beams": 4, "diversity_penalty": 0.5}, {"penalty_alpha": 0.6, "top_k": 4}]
)
def test_what_transformers_has_dropped(model, arguments):
    """Group beams and contrastive search moved to the Hub: the same error as from the plain model."""
    messages = []
    for twin in (model, plain_twin(model)):
        with pytest.raises(Exception) as error:  # noqa: PT011 (the same, whatever it is)
            generate(twin, random_ids(1, 96), **arguments)
        messages.append((error.type, str(error.value).replace("SemToken", "")))
    assert messages[0] == messages[1]


class Stop(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, LENGTHS[0] :] != -1).sum(1) >= 3


class Collect(BaseStreamer):
    def __init__(self):
        self.chunks, self.ended = [], False

    def put(self, value):
        self.chunks.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_criteria_processors_and_streamers(model):
    ids = random_ids(1, 96)
    expected = generate(model, ids).sequences
    stopped = generate(model, ids, stopping_criteria=StoppingCriteriaList([Stop()]), min_new_tokens=0)
    assert torch.equal(stopped.sequences, expected[:, : 96 + 3])
    assert stopped.past_key_values.get_seq_length() == 96 + 2
    streamer = Collect()
    generate(model, ids, streamer=streamer)
    assert streamer.chunks[0] == ids[0].tolist()
    assert [t for chunk in streamer.chunks[1:] for t in chunk] == expected[0, 96:].tolist()
    assert streamer.ended
    flat = generate(model, ids, logits_processor=LogitsProcessorList([TemperatureLogitsWarper(100.0)]))
    assert torch.equal(flat.sequences, expected)


def test_scores_are_of_the_read_logits(model):
    ids, mask = ragged_prompts(LENGTHS)
    outputs = generate(model, ids, mask, output_scores=True)
    assert len(outputs.scores) == len(outputs.logits) == STEPS
    assert all(not s.isnan().any() for s in outputs.logits)
    scores = model.compute_transition_scores(outputs.sequences, outputs.scores, normalize_logits=True)
    expected = torch.stack(outputs.logits, 1).index_fill(2, torch.tensor(2), -torch.inf).log_softmax(-1)
    torch.testing.assert_close(scores, expected.gather(2, outputs.sequences[:, 96:, None]).squeeze(2))


@pytest.mark.parametrize("drafts", ["lookup", "plain assistant", "semtoken assistant"])
def test_drafts(model, drafts):
    ids = random_ids(1, 24).repeat(1, 4)
    expected = generate(model, ids).sequences
    if drafts == "lookup":
        arguments = {"prompt_lookup_num_tokens": 3}
    else:
        family = model.config.model_type.removeprefix("semtoken_")
        assistant = tiny_model(seed=1, family=family, num_hidden_layers=1)
        arguments = {"assistant_model": plain_twin(assistant) if drafts == "plain assistant" else assistant}
    outputs = generate(model, ids, target_ratio=2.4, **arguments)
    assert torch.equal(outputs.sequences, expected)
    assert outputs.past_key_values.compressed_lengths.tolist() == [40 + STEPS - 1]


def quantized(backend):
    """Arguments of `generate`; skips where the backend is missing."""
    if backend == "fp8" and not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this Transformers knows no fp8 cache")
    if backend == "quanto":
        pytest.importorskip("optimum.quanto")
    config = {"quanto": {"nbits": 4, "residual_length": 4, "q_group_size": 16}}.get(backend, {})
    return {"cache_implementation": "quantized", "cache_config": {"backend": backend, **config}}


@pytest.mark.parametrize("backend", ["fp8", "quanto"])
@pytest.mark.parametrize("search", [{}, {"num_beams": 3}])
def test_quantized_cache(search, backend):
    """The slots are quantised like any columns: fewer bits of 2.4 times fewer positions."""
    arguments = quantized(backend)
    if search and "reorder_cache" not in vars(cache_utils.QuantizedLayer):
        pytest.skip("this Transformers reorders no quantised states")
    model = tiny_model(num_hidden_layers=3)
    ids, mask = ragged_prompts((200, 90))
    outputs, exact = (generate(model, ids, mask, **search, **more) for more in (arguments, {}))
    cache = outputs.past_key_values
    assert cache.is_compressed
    assert cache.compressed_lengths.tolist() == exact.past_key_values.compressed_lengths.tolist()
    assert cache.get_seq_length() == 200 + STEPS - 1
    # The prompt's slots were read before they were quantised.
    torch.testing.assert_close(outputs.logits[0], exact.logits[0], **CLOSE)
    plain = generate(plain_twin(model), ids, mask, **arguments, **search)
    assert cache.memory_bytes() * 2.1 < cache_bytes(plain.past_key_values)
    assert cache.memory_bytes() * 3 < exact.past_key_values.memory_bytes()


@pytest.mark.parametrize("backend", ["fp8", "quanto"])
def test_returns_of_a_quantized_cache(backend):
    """Quantised rows cannot be repeated: every copy is read."""
    ids, copies = random_ids(2, 96), {"num_return_sequences": 3, "do_sample": True, "top_k": 1}
    outputs = generate(tiny_model(), ids, None, **{**quantized(backend), **copies})
    assert outputs.past_key_values.compressed_lengths.tolist() == [40 + STEPS - 1] * 6
    once = generate(tiny_model(), ids, None, **quantized(backend))
    assert torch.equal(outputs.sequences, once.sequences.repeat_interleave(3, 0))


def test_quantized_cache_cannot_be_cropped(caplog):
    model = tiny_model(recompress_every=12)
    outputs = generate(model, random_ids(1, 96), max_new_tokens=40, min_new_tokens=40, **quantized("fp8"))
    assert outputs.past_key_values.compressed_lengths.tolist() == [40 + 39]
    (message,) = warnings_of(caplog)
    assert "cannot be cropped" in message


def test_compiled_forward():
    """`torch.compile` of the model: the stage breaks the graph and gives the same text."""
    model = tiny_model()
    ids, mask = ragged_prompts(LENGTHS)
    expected = generate(model, ids, mask)
    model.forward = torch.compile(model.forward, backend="eager")
    outputs = generate(model, ids, mask)
    assert torch.equal(outputs.sequences, expected.sequences)
    assert outputs.past_key_values.is_compressed
    torch._dynamo.reset()


def test_returns_do_not_change_what_is_short(model, compressions):
    """A prompt below the minimum stays bit for bit plain, copies and all."""
    ids, plain = random_ids(1, 12), plain_twin(model)
    for arguments in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}):
        torch.manual_seed(2)
        ours = generate(model, ids, **arguments)
        torch.manual_seed(2)
        theirs = generate(plain, ids, **arguments)
        assert torch.equal(ours.sequences, theirs.sequences)
        assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))
    assert compressions == []
