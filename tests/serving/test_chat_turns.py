"""Chats of several turns on their way to an engine: what earlier requests sent comes first, bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from semtoken_hf import SemTokenCache
from semtoken_hf.serving.chat_turns import chat_pieces
from semtoken_hf.serving.prompt_embeds import decode_prompt_embeds
from semtoken_hf.serving.request_compression import CHAT, RequestCompressor
from tests.fixtures.text import PROSE

FIRST = [{"role": "user", "content": f"{PROSE}\n\nWho has taken Netherfield Park?"}]
ANSWER = {"role": "assistant", "content": "Mr. Bingley, a young man of large fortune."}
SHORT = [*FIRST, ANSWER, {"role": "user", "content": "Is he married?"}]
LONG = [*FIRST, ANSWER, {"role": "user", "content": f"{PROSE}\n\nWhat is that to the girls?"}]
LATER = [*SHORT, {"role": "assistant", "content": "He is single."}, LONG[-1]]


@pytest.fixture(scope="module")
def rewrite(engine_folder):
    compressor = RequestCompressor(str(engine_folder))

    def rewrite(messages, **fields):
        """What an engine gets: embeddings [M, H], and the tokens that they stand for."""
        request = compressor.rewrite(CHAT, json.dumps({"messages": messages, **fields}).encode())
        (embeds,) = json.loads(request.content)["prompt_embeds"]
        embeds = decode_prompt_embeds(embeds)
        assert len(embeds) == request.slots
        return embeds, request.original_tokens

    return rewrite


@pytest.mark.parametrize("chat", [SHORT, LONG, LATER], ids=["short", "long", "three"])
def test_a_longer_chat_begins_with_the_slots_of_the_shorter_one(rewrite, chat):
    (first, read), (later, tokens) = rewrite(FIRST), rewrite(chat)
    assert len(first) < read
    assert torch.equal(later[: len(first)], first)
    # A short turn stays whole until the turns behind it make it long.
    assert (len(later) - len(first) == tokens - read) == (chat is SHORT)


def test_the_slots_are_those_of_generate_behind_a_cache(rewrite, engine_folder):
    model = AutoModelForCausalLM.from_pretrained(engine_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(engine_folder)
    cache, held = SemTokenCache(config=model.config), 0
    for messages in (FIRST, LONG):
        encoding = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_query_mask=True, return_dict=True, return_tensors="pt"
        )
        ids, question = encoding["input_ids"][:, held:], encoding["query_mask"][:, held:]
        with torch.no_grad():
            model(ids, query_mask=question, past_key_values=cache, logits_to_keep=1)
        held = encoding["input_ids"].shape[1]
    embeds, tokens = rewrite(LONG)
    assert (tokens, len(embeds)) == (held, cache.physical_length())
    with torch.no_grad():
        twin = model(inputs_embeds=embeds[None].to(model.dtype), logits_to_keep=1, compression=False, use_cache=True)
    for ours, theirs in zip(cache.layers, twin.past_key_values.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize(("shown", "count"), [("", 2), ("{{ messages|length }}", 1)], ids=["alike", "otherwise"])
def test_a_template_that_shows_earlier_turns_otherwise_leaves_one_piece(engine_folder, shown, count):
    tokenizer, text = AutoTokenizer.from_pretrained(engine_folder), "{{ m['content'] }}"
    tokenizer.chat_template = tokenizer.chat_template.replace(text, text + shown)

    def encode(messages):
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )

    pieces = chat_pieces(encode, LONG, 256)
    assert len(pieces) == count
    assert torch.equal(torch.cat([piece["input_ids"] for piece in pieces], 1), encode(LONG)["input_ids"])
