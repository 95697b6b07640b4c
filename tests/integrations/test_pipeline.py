"""`pipeline("text-generation")`: it prints what `generate` gives by hand, and the prompt really was compressed."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager

import pytest
import torch
from transformers import pipeline, set_seed

from semtoken_hf.publishing.push import prepare, push
from tests.fixtures.children import run_clean
from tests.fixtures.text import PROSE
from tests.fixtures.tiny import plain_twin, tiny_model, tiny_tokenizer
from tests.hub.hub_server import READER

TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
PARAGRAPHS = PROSE.split("\n\n")
# The last is shorter than `min_prompt_length`.
PROMPTS = [PARAGRAPHS[0], PARAGRAPHS[1][:300], PARAGRAPHS[2], "the cat"]
CHAT = [{"role": "system", "content": PARAGRAPHS[0]}, {"role": "user", "content": "What did Mr. Bennet reply?"}]
NEW = {"max_new_tokens": 8, "do_sample": False}


def chat_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def pipe():
    return pipeline("text-generation", model=tiny_model(), tokenizer=chat_tokenizer(), device="cpu")


@contextmanager
def caches_of(model):
    """The caches that `generate` uses within this block, one for each call."""
    caches, prepare_cache = [], model._prepare_cache_for_generation

    def spy(generation_config, model_kwargs, *args, **kwargs):
        result = prepare_cache(generation_config, model_kwargs, *args, **kwargs)
        caches.append(model_kwargs["past_key_values"])
        return result

    model._prepare_cache_for_generation = spy
    try:
        yield caches
    finally:
        del model._prepare_cache_for_generation


def assert_compressed(pipe, cache, prompts, ratio=2.4):
    """Each row of a cache holds the slots that its prompt has alone, int64 [1, T], and all new tokens but the last."""
    lengths, generated = [ids.shape[1] for ids in prompts], NEW["max_new_tokens"] - 1
    compressed = [length >= pipe.model.config.min_prompt_length for length in lengths]
    alone = [int(pipe.model.compress(ids, target_ratio=ratio).kept_lengths) for ids in prompts]
    slots = [kept if merges else n for kept, merges, n in zip(alone, compressed, lengths, strict=True)]
    assert cache.original_lengths.tolist() == [length + generated for length in lengths]
    assert cache.compressed_lengths.tolist() == [n + generated for n in slots]
    assert compressed[0]
    assert all(n <= math.ceil(length / ratio) for n, length, c in zip(slots, lengths, compressed, strict=True) if c)


def by_hand(pipe, ids, **options):
    """Whole sequences int64 [R, T] and the new text of each, from `generate`."""
    sequences = pipe.model.generate(ids, attention_mask=torch.ones_like(ids), **{**NEW, **options})
    return sequences, [pipe.tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True) for row in sequences]


def encode(pipe, text):
    return pipe.tokenizer(text, return_tensors="pt")["input_ids"]


def encode_chat(pipe, chat, **options):
    return pipe.tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True, **options)["input_ids"]


@pytest.mark.parametrize("full", [True, False, None])
def test_text(pipe, full):
    ids = encode(pipe, PROSE)
    _, (new,) = by_hand(pipe, ids)
    with caches_of(pipe.model) as caches:
        (result,) = pipe(PROSE, return_full_text=full, **NEW)
    assert result == {"generated_text": new if full is False else PROSE + new}
    assert_compressed(pipe, caches[0], [ids])
    assert new != by_hand(pipe, ids, compression=False)[1][0]


def test_tensors(pipe):
    ids = encode(pipe, PROSE)
    sequences, _ = by_hand(pipe, ids)
    with caches_of(pipe.model) as caches:
        (result,) = pipe(PROSE, return_tensors=True, **NEW)
    assert set(result) == {"generated_token_ids"}
    assert list(result["generated_token_ids"]) == sequences[0].tolist()
    assert_compressed(pipe, caches[0], [ids])


@pytest.mark.parametrize("full", [True, False])
def test_chat(pipe, full):
    ids = encode_chat(pipe, CHAT, add_generation_prompt=True)
    _, (reply,) = by_hand(pipe, ids)
    with caches_of(pipe.model) as caches:
        (result,) = pipe(CHAT, return_full_text=full, **NEW)
    answer = [*CHAT, {"role": "assistant", "content": reply}]
    assert result == {"generated_text": answer if full else reply}
    assert_compressed(pipe, caches[0], [ids])


def test_chat_that_the_model_continues(pipe):
    chat = [*CHAT, {"role": "assistant", "content": "He replied that"}]
    ids = encode_chat(pipe, chat, continue_final_message=True)
    _, (reply,) = by_hand(pipe, ids)
    with caches_of(pipe.model) as caches:
        (result,) = pipe(chat, **NEW)
    assert result["generated_text"] == [*CHAT, {"role": "assistant", "content": "He replied that" + reply}]
    assert_compressed(pipe, caches[0], [ids])


@pytest.mark.parametrize("batch_size", [None, 1, 2, 4])
@pytest.mark.parametrize("kind", ["text", "chat"])
def test_a_list(pipe, kind, batch_size):
    """Every row as alone; the last prompt is too short to be compressed, whatever stands beside it."""
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    inputs = PROMPTS if kind == "text" else chats
    alone = [pipe(one, **NEW)[0] for one in inputs]
    ids = [encode(pipe, p) if kind == "text" else encode_chat(pipe, p, add_generation_prompt=True) for p in inputs]
    new = [by_hand(pipe, row)[1][0] for row in ids]
    with caches_of(pipe.model) as caches:
        results = pipe(inputs, batch_size=batch_size, **NEW)
    assert [result[0] for result in results] == alone
    texts = [result[0]["generated_text"] for result in results]
    expected = [prompt + text for prompt, text in zip(PROMPTS, new, strict=True)]
    assert [t if kind == "text" else t[-1]["content"] for t in texts] == (expected if kind == "text" else new)
    size = batch_size or 1
    assert len(caches) == len(inputs) // size
    assert_compressed(pipe, caches[0], ids[:size])


def test_a_stream(pipe):
    with caches_of(pipe.model) as caches:
        results = [result[0] for result in pipe((prompt for prompt in PROMPTS[:3]), batch_size=3, **NEW)]
    assert results == [pipe(prompt, **NEW)[0] for prompt in PROMPTS[:3]]
    assert_compressed(pipe, caches[0], [encode(pipe, prompt) for prompt in PROMPTS[:3]])


def test_options_of_one_call(pipe):
    ids = encode(pipe, PROSE)
    for options in ({"target_ratio": 4.0}, {"num_beams": 3, "num_return_sequences": 2}):
        with caches_of(pipe.model) as caches:
            results = pipe(PROSE, **NEW, **options)
        assert [r["generated_text"] for r in results] == [PROSE + new for new in by_hand(pipe, ids, **options)[1]]
        rows = [ids] * options.get("num_beams", 1)
        assert_compressed(pipe, caches[0], rows, options.get("target_ratio", 2.4))
    sampled = {"do_sample": True, "temperature": 0.7, "max_new_tokens": 8}
    set_seed(0)
    expected = by_hand(pipe, ids, **sampled)[1][0]
    set_seed(0)
    assert pipe(PROSE, **sampled)[0]["generated_text"] == PROSE + expected


def test_options_of_the_pipeline():
    pipe = pipeline("text-generation", model=tiny_model(), tokenizer=tiny_tokenizer(), target_ratio=4.0, **NEW)
    ids = encode(pipe, PROSE)
    with caches_of(pipe.model) as caches:
        result = pipe(PROSE)
    assert result[0]["generated_text"] == PROSE + by_hand(pipe, ids, target_ratio=4.0)[1][0]
    assert_compressed(pipe, caches[0], [ids], 4.0)


def test_off_is_the_pipeline_of_the_plain_model(pipe):
    plain = pipeline("text-generation", model=plain_twin(pipe.model), tokenizer=chat_tokenizer(), device="cpu")
    for inputs, options in ((PROSE, {}), (CHAT, {}), (PROMPTS, {"batch_size": 4}), (PROSE, {"num_beams": 2})):
        ours = pipe(inputs, compression=False, **NEW, **options)
        assert ours == plain(inputs, **NEW, **options)
        assert ours != pipe(inputs, **NEW, **options)


def test_a_tokenizer_that_pads_on_the_right(pipe):
    """The pipeline turns it around, as for every causal model."""
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "right"
    turned = pipeline("text-generation", model=pipe.model, tokenizer=tokenizer, device="cpu")
    with caches_of(pipe.model) as caches:
        assert turned(PROMPTS[:3], batch_size=3, **NEW) == [pipe(prompt, **NEW) for prompt in PROMPTS[:3]]
    assert_compressed(pipe, caches[0], [encode(pipe, prompt) for prompt in PROMPTS[:3]])


# Read in a fresh interpreter, where this package does not exist.
CHILD = """
import json, sys
sys.modules["semtoken_hf"] = None
from transformers import pipeline
task = json.loads(sys.argv[1])
def facts(model, hub):
    pipe = pipeline("text-generation", model=model, device="cpu", trust_remote_code=True, **hub)
    caches, prepare_cache = [], pipe.model._prepare_cache_for_generation
    def spy(generation_config, model_kwargs, *args, **kwargs):
        prepare_cache(generation_config, model_kwargs, *args, **kwargs)
        caches.append(model_kwargs["past_key_values"])
    pipe.model._prepare_cache_for_generation = spy
    results = {
        "text": pipe(task["text"], **task["new"]),
        "new": pipe(task["text"], return_full_text=False, **task["new"]),
        "chat": pipe(task["chat"], **task["new"]),
        "batch": pipe(task["prompts"], batch_size=4, **task["new"]),
        "ratio": pipe(task["text"], target_ratio=4.0, **task["new"]),
    }
    parts = (pipe.model, pipe.tokenizer, caches[0])
    assert all(type(part).__module__.startswith("transformers_modules.") for part in parts), parts
    return {"results": results, "slots": [cache.compressed_lengths.tolist() for cache in caches]}
print("FACTS" + json.dumps({name: facts(*source) for name, source in task["sources"].items()}))
"""


@pytest.mark.slow
def test_by_folder_and_by_hub_id_in_a_clean_process(pipe, tmp_path, hub):
    """A local folder, and the same pushed to a private repository and loaded by a pinned revision."""
    folder = tmp_path / "checkpoint"
    pipe.model.save_pretrained(folder)
    pipe.tokenizer.save_pretrained(folder)
    with caches_of(pipe.model) as caches:
        expected = {
            "text": pipe(PROSE, **NEW),
            "new": pipe(PROSE, return_full_text=False, **NEW),
            "chat": pipe(CHAT, **NEW),
            "batch": pipe(PROMPTS, batch_size=4, **NEW),
            "ratio": pipe(PROSE, target_ratio=4.0, **NEW),
        }
    assert_compressed(pipe, caches[0], [encode(pipe, PROSE)])
    done = push(prepare(folder, "me/pipe"))
    hub.repositories["me/pipe"].add_commit("main", "broken since", {"config.json": b"{}"})
    sources = {"folder": (str(folder), {}), "hub": ("me/pipe", {"revision": done.sha, "token": READER})}
    task = {"text": PROSE, "chat": CHAT, "prompts": PROMPTS, "new": NEW, "sources": sources}
    facts = run_clean(CHILD, json.dumps(task), home=tmp_path / "home", variables=hub.variables)
    slots = [cache.compressed_lengths.tolist() for cache in caches]
    assert facts == {name: {"results": expected, "slots": slots} for name in sources}
