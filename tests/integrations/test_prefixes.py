"""Texts compressed once: used by `generate`, pipelines and chats, joined, kept in files, or refused.

And the other ways to keep a text in a cache: with drafts, in pieces, plain.
"""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DynamicCache, pipeline

from semtoken_hf import CompressedPrefix, SemTokenCache
from tests.fixtures.adapted import adapted_model
from tests.fixtures.children import run_clean
from tests.fixtures.logs import warnings_of
from tests.fixtures.text import PROSE
from tests.fixtures.tiny import FAMILIES, random_ids, tiny_model, tiny_tokenizer

OPTIONS = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "eos_token_id": None}
MODES = [
    (family, mode) for family in FAMILIES for mode in ("original", "compact") if (family, mode) != ("gpt2", "original")
]


def question(length=6, seed=9):
    return random_ids(1, length + 1, seed)[:, 1:]


def by_hand(model, ids, prefix_ids):
    """What a chat on a returned cache gives, which the prefix must equal."""
    cache = model(prefix_ids, logits_to_keep=1).past_key_values
    return model.generate(ids, past_key_values=cache, **OPTIONS)


@pytest.mark.parametrize(("family", "mode"), MODES)
def test_it_is_read_as_a_turn_behind_a_returned_cache(family, mode, tmp_path):
    model, ids = tiny_model(family=family, position_mode=mode), random_ids(1, 90)
    prefix = model.compress_prefix(ids)
    assert prefix.original_length == 90
    assert prefix.compressed_length == int(model.compress(ids).kept_lengths) < 45
    inputs = prefix.inputs(question())
    expected = by_hand(model, inputs["input_ids"], ids)
    prefix.save(tmp_path / "whole")
    prefix.save(tmp_path / "slots", with_keys=False)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["slots", "whole"]
    assert (tmp_path / "slots").stat().st_size < (tmp_path / "whole").stat().st_size
    # A second question reads nothing of the first.
    for one in (prefix, prefix, *(CompressedPrefix.load(tmp_path / name, model) for name in ("whole", "slots"))):
        outputs = model.generate(**{**inputs, "past_key_values": one}, **OPTIONS)
        assert torch.equal(outputs.sequences, expected.sequences)
        assert torch.equal(outputs.past_key_values.slot_lengths, expected.past_key_values.slot_lengths)
    logits = model(question(), past_key_values=prefix).logits
    cache = model(ids, logits_to_keep=1).past_key_values
    torch.testing.assert_close(logits, model(question(), past_key_values=cache).logits)


@pytest.mark.parametrize("attention", ["sdpa", "semtoken_varlen"])
def test_questions_of_a_batch_and_beams_are_answered_as_if_alone(attention):
    model = tiny_model()
    model.set_attn_implementation(attention)
    prefix = model.compress_prefix(random_ids(1, 90))
    alone = [model.generate(**prefix.inputs(question(n, n)), **OPTIONS).sequences[0, -8:] for n in (6, 40)]
    padded, mask = torch.zeros(2, 40, dtype=torch.long), torch.ones(2, 40, dtype=torch.long)
    mask[0, :34], padded[0, 34:], padded[1] = 0, question(6, 6)[0], question(40, 40)[0]
    together = model.generate(**prefix.inputs(padded, attention_mask=mask), **OPTIONS)
    assert torch.equal(together.sequences[:, -8:], torch.stack(alone))
    inputs = prefix.inputs(question())
    beams = model.generate(**inputs, num_beams=3, num_return_sequences=2, **OPTIONS)
    cache = prefix.cache()
    cache.batch_repeat_interleave(3)
    expected = model.generate(**{**inputs, "past_key_values": cache}, num_beams=3, num_return_sequences=2, **OPTIONS)
    assert torch.equal(beams.sequences, expected.sequences)


def test_drafts_behind_a_cache_read_the_new_tokens_alone():
    model, ids = tiny_model(), random_ids(1, 90).repeat(1, 2)
    first, again = (model.generate(ids, **OPTIONS) for _ in range(2))
    ids = torch.cat([first.sequences, question()], 1)
    greedy = model.generate(ids, past_key_values=first.past_key_values, **OPTIONS)
    drafted = model.generate(ids, past_key_values=again.past_key_values, prompt_lookup_num_tokens=4, **OPTIONS)
    assert torch.equal(drafted.sequences, greedy.sequences)
    cache = drafted.past_key_values
    assert cache.get_seq_length() == 180 + 8 + 6 + 7
    assert torch.equal(cache.slot_lengths, greedy.past_key_values.slot_lengths)
    mask = torch.ones(1, 207, dtype=torch.long)
    with pytest.raises(ValueError, match=r"drafts need the whole sequence: `input_ids` hold 6 tokens behind 201"):
        model.generate(question(), attention_mask=mask, past_key_values=cache, prompt_lookup_num_tokens=4, **OPTIONS)
    prefix = model.compress_prefix(ids)
    inputs = prefix.inputs(question())
    drafted = model.generate(**inputs, prompt_lookup_num_tokens=4, **OPTIONS)
    assert torch.equal(drafted.sequences, model.generate(**inputs, **OPTIONS).sequences)


def test_pipelines_and_chats():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    pipe, text = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu"), PROSE[:600]
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    questions = [" Who was the man?", " and the cat"]
    prefix = model.compress_prefix(text, tokenizer)
    expected = model.generate(**prefix.inputs(questions[0], tokenizer), **OPTIONS).sequences[0, -8:]
    answers = pipe([text + one for one in questions], past_key_values=prefix, **options)
    assert answers[0][0]["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)
    chat = [{"role": "system", "content": text}, {"role": "user", "content": questions[0]}]
    first = tokenizer.apply_chat_template(chat[:1], return_tensors="pt")["input_ids"]
    whole = tokenizer.apply_chat_template(chat, return_tensors="pt")
    prefix = model.compress_prefix(first)
    expected = by_hand(model, whole["input_ids"], first).sequences
    assert torch.equal(model.generate(**whole, past_key_values=prefix, **OPTIONS).sequences, expected)
    (answer,) = pipe(chat, past_key_values=prefix, **options)
    assert answer["generated_text"] == tokenizer.decode(expected[0, -8:], skip_special_tokens=True)


def test_the_prefix_is_cropped_to_what_a_sequence_shares_with_it():
    """A tokenizer may join its last token with what follows; with no question, its last token is read again."""
    model, ids = tiny_model(), random_ids(1, 90)
    prefix = model.compress_prefix(ids)
    other = ids.clone()
    other[:, -1] += 1
    for whole, shared in ((torch.cat([other, question()], 1), 89), (ids, 89), (ids[:, :-1], 88)):
        cache = prefix.cache()
        cache.crop(shared - 90)
        expected = model(whole[:, shared:], past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1)
        outputs = model.generate(whole, past_key_values=prefix, **OPTIONS)
        assert torch.equal(outputs.sequences[:, whole.shape[1]], expected)
        assert outputs.past_key_values.get_seq_length() == whole.shape[1] + 7
    longer = torch.cat([outputs.sequences, question()], 1)  # the next turn
    again = model.generate(longer, past_key_values=outputs.past_key_values, **OPTIONS)
    assert again.past_key_values.get_seq_length() == longer.shape[1] + 7
    with pytest.raises(ValueError, match=r"share 0 tokens with the prefix of 90 .*\*\*prefix\.inputs\(question"):
        model.generate(question(), past_key_values=prefix, **OPTIONS)


@pytest.mark.parametrize("mode", ["original", "compact"])
def test_joined_prefixes_are_read_together_in_any_order(mode):
    model = tiny_model(position_mode=mode)
    parts = [model.compress_prefix(random_ids(1, n, n)) for n in (90, 12, 60)]
    assert [part.prompt.is_merged for part in parts] == [True, False, True]
    for order in ((0, 1, 2), (2, 0), (1,)):
        chosen = [parts[i] for i in order]
        joined = model.join_prefixes(chosen)
        assert torch.equal(joined.input_ids, torch.cat([part.input_ids for part in chosen], 1))
        # One plan over all of it, cut where they were.
        plan, slots = [], 0
        for part in chosen:
            plan.append(part.prompt.span_ids + slots)
            slots += part.compressed_length
        protected = torch.cat([part.prompt.slot_lengths[:, part.prompt.span_ids[0]] == 1 for part in chosen], 1)
        prompt = model.compress(joined.input_ids, span_ids=torch.cat(plan, 1), protected_mask=protected)
        assert torch.equal(joined.prompt.slot_lengths, prompt.slot_lengths)
        assert torch.equal(joined.prompt.position_ids, prompt.position_ids)
        assert torch.equal(joined.prompt.inputs_embeds, prompt.inputs_embeds)
        inputs = joined.inputs(question())
        cache = SemTokenCache(config=model.config)
        model(
            joined.input_ids,
            span_ids=torch.cat(plan, 1),
            protected_mask=protected,
            past_key_values=cache,
            logits_to_keep=1,
        )
        expected = model.generate(inputs["input_ids"], past_key_values=cache, **OPTIONS)
        assert torch.equal(model.generate(**inputs, **OPTIONS).sequences, expected.sequences)
    with pytest.raises(ValueError, match="at least one"):
        model.join_prefixes([])
    with pytest.raises(ValueError, match="prefix 1 was compressed by another model"):
        model.join_prefixes([parts[0], tiny_model(position_mode=mode).compress_prefix(random_ids(1, 30))])


def test_without_compression_it_is_the_plain_model():
    model, ids = tiny_model(), random_ids(1, 90)
    inputs = model.compress_prefix(ids, target_ratio=1).inputs(question())
    expected = model.generate(inputs["input_ids"], compression=False, **OPTIONS).sequences
    assert torch.equal(model.generate(**inputs, **OPTIONS).sequences, expected)
    model.config.compression = False
    assert torch.equal(model.generate(**model.compress_prefix(ids).inputs(question()), **OPTIONS).sequences, expected)


def test_an_adapter_acts_on_what_merged(tmp_path):
    model, ids = adapted_model(), random_ids(1, 90)
    prefix = model.compress_prefix(ids)
    inputs = prefix.inputs(question())
    assert torch.equal(
        model.generate(**inputs, **OPTIONS).sequences, by_hand(model, inputs["input_ids"], ids).sequences
    )


def test_a_file_is_read_by_a_bare_process(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    prefix = model.compress_prefix(random_ids(1, 90))
    prefix.save(tmp_path / "prefix.safetensors")
    inputs = prefix.inputs(question())
    code = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
prefix = model.load_prefix(sys.argv[2])
ids = torch.tensor([json.loads(sys.argv[3])])
out = model.generate(**prefix.inputs(ids), max_new_tokens=8, do_sample=False, eos_token_id=None)
print("FACTS" + json.dumps(out[0].tolist()))
"""
    arguments = (tmp_path / "model", tmp_path / "prefix.safetensors", json.dumps(question()[0].tolist()))
    assert (
        run_clean(code, *arguments, home=tmp_path / "home") == model.generate(**inputs, **OPTIONS).sequences[0].tolist()
    )


def trained(model):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 1e-3
    return model


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: tiny_model(dtype=torch.bfloat16),
            r"`dtype` is 'float32' in the file and 'bfloat16' in the model; load",
        ),
        (
            lambda: tiny_model(position_mode="compact"),
            r"`position_mode` is 'original' in .* 'compact' .*; set `config\.",
        ),
        (lambda: tiny_model(num_hidden_layers=3), r"`num_hidden_layers` is 2 in the file and 3 in the model"),
        (lambda: tiny_model(num_key_value_heads=4), r"`num_key_value_heads` is 2 .* and 4"),
        (lambda: tiny_model(merge_mode="representative"), r"`merge_mode` is 'mean' .* and 'representative'"),
        (lambda: tiny_model(family="mistral"), r"`model_type` is 'semtoken_llama' .* and 'semtoken_mistral'"),
        (lambda: trained(tiny_model()), r"`weights` is '[0-9a-f]{16}' .* and '[0-9a-f]{16}' .*; load the weights"),
    ],
)
def test_a_file_of_another_model_is_refused_by_name(other, message, tmp_path):
    tiny_model().compress_prefix(random_ids(1, 90)).save(tmp_path / "file")
    with pytest.raises(ValueError, match=message + r".*or compress the text again"):
        other().load_prefix(tmp_path / "file")


def test_what_may_differ(tmp_path):
    """The plan is settled, and what made it is read no more."""
    tiny_model().compress_prefix(random_ids(1, 90)).save(tmp_path / "file")
    model = tiny_model(target_ratio=4.0, recent_window=8)
    model.model.semantic_encoder.encoder.get_input_embeddings().weight.data.zero_()
    model.set_attn_implementation("eager")
    assert model.load_prefix(tmp_path / "file").original_length == 90


def test_damaged_files_and_nonsense_are_refused(tmp_path):
    model, file = tiny_model(), tmp_path / "file"
    prefix = model.compress_prefix(random_ids(1, 90))
    prefix.save(file)
    whole = file.read_bytes()
    with safe_open(file, "pt") as held:
        metadata, names = held.metadata(), held.keys()
        tensors = {name: held.get_tensor(name).clone() for name in names}
    for content, message in ((whole[:-100], "damaged"), (b"no safetensors", "damaged")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            model.load_prefix(file)
    for changed, message in (
        ({"metadata": {}}, "is no compressed prefix: write one"),
        ({"metadata": {**metadata, "version": "0"}}, "of version 0, this code reads 1"),
        ({"tensors": {**tensors, "slot_lengths": tensors["slot_lengths"] + 1}}, "do not add up"),
    ):
        save_file(**{"tensors": tensors, "metadata": metadata, "filename": file, **changed})
        with pytest.raises(ValueError, match=message):
            model.load_prefix(file)
    with pytest.raises(FileNotFoundError):
        model.load_prefix(tmp_path / "missing")
    file.write_bytes(whole)
    with pytest.raises(NotImplementedError):  # what cannot be written
        CompressedPrefix(model, prefix.input_ids.to("meta"), prefix.prompt).save(file)
    assert file.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    with pytest.raises(ValueError, match="text needs its `tokenizer`"):
        model.compress_prefix("the cat")
    with pytest.raises(ValueError, match=r"one text or ids of shape \[1, tokens\], got \(2, 30\)"):
        model.compress_prefix(random_ids(2, 30))
    with pytest.raises(ValueError, match="the prefix is of another model"):
        tiny_model().generate(**prefix.inputs(question()), **OPTIONS)
    model.config.position_mode = "compact"
    with pytest.raises(ValueError, match="position_mode='original', and the model's is now 'compact'"):
        prefix.cache()


TO_WRITE = "`cache = model(input_ids, logits_to_keep=1).past_key_values`"


def pieces(model, ids, cache):
    for start in range(0, ids.shape[1], 12):
        cache = model(ids[:, start : start + 12], past_key_values=cache, logits_to_keep=1).past_key_values


def one_call(model, ids, cache):
    cache = model(ids[:, :-4], past_key_values=cache).past_key_values
    model.generate(ids, past_key_values=cache, **OPTIONS)


def generate(model, ids, cache):
    model.generate(ids, past_key_values=cache, **OPTIONS)


@pytest.mark.parametrize(
    ("fill", "make"),
    [
        *((fill, make) for fill in (pieces, one_call) for make in (None, SemTokenCache, DynamicCache)),
        (generate, DynamicCache),
        (lambda model, ids, cache: model(ids, use_cache=True), None),
    ],
)
def test_a_cache_that_is_filled_plain_says_once_what_to_write(fill, make, caplog):
    model, ids = tiny_model(), random_ids(1, 90)
    fill(model, ids, None if make is None else make(config=model.config))
    (said,) = warnings_of(caplog)
    assert TO_WRITE in said


def test_scoring_and_chats_of_short_turns_fill_nothing_plain(caplog):
    model, ids, cache = tiny_model(), random_ids(1, 8), None
    model(random_ids(1, 90))
    for turn in range(4):
        outputs = model.generate(
            ids, past_key_values=cache, prompt_lookup_num_tokens=3 if turn % 2 else None, **OPTIONS
        )
        ids, cache = torch.cat([outputs.sequences, question(6, turn)], 1), outputs.past_key_values
    assert warnings_of(caplog) == []
