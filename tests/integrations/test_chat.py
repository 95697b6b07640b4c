"""Chats: which tokens are the template's, which the question's, and what growing contexts keep."""

import pytest
import torch

from semtoken_hf.tokenization_semtoken_fast import content_spans
from tests.fixtures.tiny import ragged_prompts, random_ids, tiny_model, tiny_tokenizer

# As Llama 3's, ChatML with default system text, and Llama 2's, which puts the system text into the first user turn.
TEMPLATES = {
    "llama3": (
        "{{ bos_token }}{% for m in messages %}[[{{ m['role'] }}]]\n\n{{ m['content'] | trim }}<end>{% endfor %}"
        "{% if add_generation_prompt %}[[assistant]]\n\n{% endif %}"
    ),
    "chatml": (
        "{% if messages[0]['role'] != 'system' %}<im>system\nyou are a cat<me>\n{% endif %}"
        "{% for m in messages %}<im>{{ m['role'] }}\n{{ m['content'] }}<me>\n{% endfor %}"
        "{% if add_generation_prompt %}<im>assistant\n{% endif %}"
    ),
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set s = '<<SYS>>' + messages[0]['content'] + '<</SYS>>' %}"
        "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}"
        "{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST] {{ (s if loop.first else '') + m['content'] }} "
        "[/INST]{% else %} {{ m['content'] | trim }} </s>{% endif %}{% endfor %}"
    ),
}
CHAT = [
    {"role": "system", "content": "the dog is a user"},
    {"role": "user", "content": "the cat sat on the mat and the dog ran to the man " * 3},
    {"role": "assistant", "content": "assistant the man"},
    {"role": "user", "content": "user where did the cat sit?"},
]


def text_of(tokenizer, ids, mask):
    """The text of the tokens that a mask marks."""
    return tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])


@pytest.fixture(params=TEMPLATES)
def tokenizer(request):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES[request.param]
    return tokenizer


def test_the_question_and_the_template_are_found(tokenizer):
    kwargs = {"add_generation_prompt": True}
    encoding = tokenizer.apply_chat_template(CHAT, protect_template=True, return_query_mask=True, **kwargs)
    plain = tokenizer.apply_chat_template(CHAT, **kwargs)
    assert encoding.keys() - plain.keys() == {"protected_mask", "query_mask"}
    ids = encoding["input_ids"]
    assert ids == plain["input_ids"]
    assert text_of(tokenizer, ids, encoding["query_mask"]).strip() == CHAT[-1]["content"]
    free = [1 - m for m in encoding["protected_mask"]]
    # What may merge is the messages' own text (a token may share a character with the template), in order.
    assert text_of(tokenizer, ids, free).replace(" ", "") == "".join(m["content"] for m in CHAT).replace(" ", "")
    names = ["[[", "]]", "<end>", "<im>", "<me>", "INST", "SYS"]
    template = text_of(tokenizer, ids, encoding["protected_mask"])
    assert sum(template.count(name) for name in names) == sum(
        tokenizer.apply_chat_template(CHAT, tokenize=False, **kwargs).count(name) for name in names
    )


def test_messages_that_say_what_the_template_says():
    """Found by place and not by text: the first "user" of the rendered chat is the template's."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES["chatml"]
    chat = [{"role": "system", "content": "system"}, {"role": "user", "content": "user"}]

    def render(messages):
        return tokenizer.apply_chat_template(messages, tokenize=False)

    text = render(chat)
    assert content_spans(render, chat) == [(11, 17, 0), (text.rindex("user"), text.rindex("user") + 4, 1)]


@pytest.mark.parametrize("return_tensors", [None, "pt"])
def test_batches(tokenizer, return_tensors):
    chats = [CHAT, CHAT[1:], CHAT[3:]]
    options = {"protect_template": True, "return_query_mask": True}
    together = tokenizer.apply_chat_template(chats, padding=True, return_tensors=return_tensors, **options)
    width = len(together["input_ids"][0])
    for row, chat in enumerate(chats):
        alone = tokenizer.apply_chat_template(chat, **options)
        for name in ("protected_mask", "query_mask"):
            values = together[name][row]
            values = values.tolist() if return_tensors else values
            length = len(alone[name])
            assert len(values) == width
            assert values[width - length :] == alone[name]
            assert not any(values[: width - length])
    if return_tensors:
        assert all(isinstance(value, torch.Tensor) and value.shape == (3, width) for value in together.values())


def test_parts_and_truncation(tokenizer):
    parts = [{"type": "text", "text": "the cat"}, {"type": "image"}]
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{% for p in m['content'] %}"
        "{% if p['type'] == 'text' %}{{ p['text'] }}{% else %}[IMG]{% endif %}{% endfor %}{% endfor %}"
    )
    encoding = tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}], return_query_mask=True, protect_template=True
    )
    assert text_of(tokenizer, encoding["input_ids"], encoding["query_mask"]) == "the cat"
    cut = tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}], return_query_mask=True, truncation=True, max_length=5
    )
    assert cut["query_mask"] == encoding["query_mask"][:5]


def test_the_question_steers_and_stays_whole(tokenizer):
    model = tiny_model(segmentation_mode="greedy", query_weight=2.0, recent_window=1, merge_mode="representative")
    inputs = tokenizer.apply_chat_template(
        CHAT, protect_template=True, return_query_mask=True, return_tensors="pt", add_generation_prompt=True
    )
    outputs = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True, do_sample=False)
    marked = {name: inputs[name] for name in ("protected_mask", "query_mask")}
    prompt = model.compress(inputs["input_ids"], **marked)
    assert prompt.is_merged
    assert torch.equal(outputs.past_key_values.slot_lengths[:, : prompt.slot_lengths.shape[1]], prompt.slot_lengths)
    whole = prompt.slot_lengths[0, prompt.span_ids[0]] == 1
    assert whole[(inputs["protected_mask"][0] | inputs["query_mask"][0]).bool()].all()
    assert not torch.equal(prompt.span_ids, model.compress(inputs["input_ids"]).span_ids)


def test_empty_texts():
    """A call of a tool has no text, and templates ask whether there is any."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{% if m['content'] %}{{ '\n' + m['content'] }}{% endif %}{% endfor %}"
    )
    chat = [CHAT[1], {"role": "assistant", "content": "", "tool_calls": []}, CHAT[3]]
    encoding = tokenizer.apply_chat_template(chat, return_query_mask=True, protect_template=True)
    assert text_of(tokenizer, encoding["input_ids"], encoding["query_mask"]) == CHAT[3]["content"]


def test_padding_later(tokenizer):
    """As a data collator does it."""
    options = {"return_query_mask": True, "protect_template": True}
    chats = [CHAT, CHAT[3:]]
    at_once = tokenizer.apply_chat_template(chats, padding=True, **options)
    later = tokenizer.pad([tokenizer.apply_chat_template(chat, **options) for chat in chats])
    assert at_once.data == later.data


def test_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(ValueError, match=r"changes the text of the messages.*`protected_mask`"):
        tokenizer.apply_chat_template(CHAT, protect_template=True)
    assert tokenizer.apply_chat_template(CHAT)["input_ids"]
    for options in ({"tokenize": False}, {"return_dict": False}):
        with pytest.raises(ValueError, match="need `tokenize` and `return_dict`"):
            tokenizer.apply_chat_template(CHAT, return_query_mask=True, **options)


def test_turns_with_a_template():
    """Four turns on a returned cache: each renders the whole chat, and only what is new is read and compressed."""
    tokenizer, model = tiny_tokenizer(), tiny_model(recent_window=8, min_prompt_length=16)
    tokenizer.chat_template = TEMPLATES["llama3"].replace(" | trim", "")
    chat, cache, held, outputs = [], None, [], None
    for turn in range(4):
        chat.append({"role": "user", "content": "the cat sat on the mat and the dog ran to the man " * 2})
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, protect_template=True, return_tensors="pt"
        )
        if cache is not None:
            # The answer as it was generated, whatever the template makes of its text.
            new = inputs["input_ids"].shape[1] - len(tokenizer.apply_chat_template(chat[:-1])["input_ids"])
            ids = torch.cat([outputs.sequences, inputs["input_ids"][:, -new:]], dim=1)
            past = torch.zeros_like(outputs.sequences)
            mask = torch.cat([past, inputs["protected_mask"][:, -new:]], dim=1)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "protected_mask": mask}
        before = 0 if cache is None else cache.get_seq_length()
        outputs = model.generate(
            **inputs, past_key_values=cache, max_new_tokens=6, min_new_tokens=6, return_dict_in_generate=True
        )
        cache = outputs.past_key_values
        for layer, (slots, keys) in zip(cache.layers, held, strict=bool(held)):
            assert torch.equal(layer.keys[:, :, :slots], keys)
        held = [(layer.keys.shape[2], layer.keys.clone()) for layer in cache.layers]
        assert cache.get_seq_length() == outputs.sequences.shape[1] - 1
        assert cache.original_lengths.tolist() == [cache.get_seq_length()]
        read = inputs["input_ids"].shape[1] - before
        assert turn == 0 or read < 90
        chat.append({"role": "assistant", "content": "ok"})
    assert cache.physical_length() < cache.get_seq_length() / 1.5


@pytest.mark.parametrize("position_mode", ["original", "compact"])
@pytest.mark.parametrize("turn", [40, 12])
def test_rows_that_finish_early(position_mode, turn):
    """The next turn's mask hides what fills them up, and each row goes on as it does alone."""
    model = tiny_model(position_mode=position_mode)
    ids, mask = ragged_prompts((60, 50))
    arguments = {"max_new_tokens": 20, "return_dict_in_generate": True, "pad_token_id": 0, "do_sample": False}
    rows = [row[m.bool()][None] for row, m in zip(ids, mask, strict=True)]
    answers = [model.generate(row, eos_token_id=None, **arguments).sequences[0, -20:].tolist() for row in rows]
    eos = next(token for token in answers[1][4:] if token not in answers[0])
    arguments |= {"eos_token_id": eos}
    new = random_ids(2, turn + 1, 9)[:, 1:]
    first = model.generate(ids, attention_mask=mask, **arguments)
    answer = first.sequences[:, 60:]
    is_filler = ((answer == eos).cumsum(1) - (answer == eos).long()) > 0
    assert is_filler[1].sum() > 2
    assert not is_filler[0].any()
    sequences = torch.cat([first.sequences, new], dim=1)
    mask = torch.cat([mask, (~is_filler).long(), torch.ones_like(new)], dim=1)
    together = model.generate(sequences, attention_mask=mask, past_key_values=first.past_key_values, **arguments)
    for row, prompt in enumerate(rows):
        alone = model.generate(prompt, **arguments)
        if alone.sequences[0, -1] == eos:  # the batch has read it already
            model(alone.sequences[:, -1:], past_key_values=alone.past_key_values)
        sequences = torch.cat([alone.sequences, new[row : row + 1]], dim=1)
        alone = model.generate(sequences, past_key_values=alone.past_key_values, **arguments)
        length = alone.sequences.shape[1] - sequences.shape[1]
        assert torch.equal(together.sequences[row, 80 + turn :][:length], alone.sequences[0, sequences.shape[1] :])


def test_only_new_ids():
    """`generate` also takes the new turn's ids alone, with a mask over all tokens."""
    model = tiny_model()
    first, turn = random_ids(1, 80), random_ids(1, 41, 1)[:, 1:]
    arguments = {"max_new_tokens": 5, "min_new_tokens": 5, "return_dict_in_generate": True}
    whole, alone = (model.generate(first, **arguments) for _ in range(2))
    ids = torch.cat([whole.sequences, turn], dim=1)
    expected = model.generate(ids, past_key_values=whole.past_key_values, **arguments)
    new = ids[:, alone.past_key_values.get_seq_length() :]
    outputs = model.generate(
        new, attention_mask=torch.ones_like(ids), past_key_values=alone.past_key_values, **arguments
    )
    assert torch.equal(outputs.sequences[:, -5:], expected.sequences[:, -5:])
    assert torch.equal(outputs.past_key_values.slot_lengths, expected.past_key_values.slot_lengths)
