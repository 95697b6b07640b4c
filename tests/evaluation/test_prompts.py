import pytest
import torch
from transformers import AutoTokenizer

from semtoken_hf.evaluation.prompts import Example, Prompt, tokenise
from tests.fixtures.evaluation_data import EMBEDDED

CONTEXT = "the cat sat on the mat and the dog ran to the man. " * 8
QUESTION = "Question: who sat?\nAnswer:"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def prompt_of(tokenizer, limit=10**9, target_limit=64, **fields):
    values = {"id": "e", "context": CONTEXT, "question": QUESTION, "answers": ["cat"], **fields}
    return tokenise(Example(**values), tokenizer, limit, target_limit)


def runs(tokenizer, prompt):
    """Text of every run of marked tokens."""
    texts, last = [], None
    for i in prompt.answer.nonzero().flatten().tolist():
        if last != i - 1:
            texts.append([])
        texts[-1].append(int(prompt.ids[i]))
        last = i
    return [tokenizer.decode(ids).strip() for ids in texts]


def test_a_prompt_is_bos_then_context_then_question(tokenizer):
    facts = {"all_classes": ["cat", "dog"]}
    prompt = prompt_of(tokenizer, answers=["cat", "dog"], group="animals", facts=facts)
    context, question = ids_of(tokenizer, CONTEXT), ids_of(tokenizer, QUESTION)
    assert prompt.ids.tolist() == [tokenizer.bos_token_id, *context, *question]
    assert prompt.length == 1 + len(context) + len(question)
    assert prompt.question_length == len(question)
    assert prompt.question.tolist() == [False] * (1 + len(context)) + [True] * len(question)
    assert prompt.place.tolist() == list(range(prompt.length))
    assert (prompt.id, prompt.group, prompt.answers, prompt.facts) == ("e", "animals", ["cat", "dog"], facts)


@pytest.mark.parametrize("room", [1, 41])
def test_a_long_context_loses_its_middle_and_the_question_stays_whole(tokenizer, room):
    context, question = ids_of(tokenizer, CONTEXT), ids_of(tokenizer, QUESTION)
    limit = 1 + room + len(question)
    prompt = prompt_of(tokenizer, limit)
    head = room // 2
    assert prompt.ids.tolist() == [
        tokenizer.bos_token_id,
        *context[:head],
        *context[len(context) - (room - head) :],
        *question,
    ]
    assert prompt.length == len(prompt.answer) == limit
    assert prompt.question_length == len(question)


def test_a_question_beyond_the_limit_is_an_error(tokenizer):
    limit = len(ids_of(tokenizer, QUESTION)) + 1
    with pytest.raises(ValueError, match=f"question of e has .* tokens: no room within {limit}"):
        prompt_of(tokenizer, limit)


def test_the_answer_is_marked_wherever_it_stands(tokenizer):
    prompt = prompt_of(tokenizer, context="dog cat. It said: the cat, twice: catcat!", answers=["cat"])
    assert runs(tokenizer, prompt) == ["cat", "cat", "catcat"]
    assert not prompt.answer[0]
    assert not prompt.answer[prompt.question].any()


@pytest.mark.parametrize(
    ("question", "gold", "scored"),
    [
        ("Answer:", "the cat", " the cat"),
        ("Answer: ", "the cat", "the cat"),
        ("回答", "猫", "猫"),
    ],
)
def test_the_target_follows_the_question_with_its_gap(tokenizer, question, gold, scored):
    prompt = prompt_of(tokenizer, question=question, answers=[gold, "another"])
    assert tokenizer.decode(prompt.target) == scored
    assert prompt.target.tolist() == ids_of(tokenizer, scored)
    assert prompt.target.dtype == torch.long


@pytest.mark.parametrize(("length", "ratio", "slots"), [(24, 2.4, 10), (25, 2.4, 11), (7, 8.0, 1)])
def test_the_budget_is_what_the_model_counts(length, ratio, slots):
    ids = torch.zeros(length, dtype=torch.long)
    assert Prompt(id="e", ids=ids, question_length=0, target=ids[:0], answer=ids.bool()).budget(ratio) == slots


def test_a_text_survives_its_tokens(tokenizer):
    context = "Élan, 彭伯里。\u2028 a\n\n  b ,c <unk> @-@ 's"
    prompt = prompt_of(tokenizer, context=context)
    assert prompt.round_trip
    assert tokenizer.decode(prompt.ids[1:]) == context + QUESTION


TEMPLATE = (
    "<s>system: be brief\n{% for m in messages %}{{ m.role }}: {{ m.content | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}{{ '\nassistant: ' }}{% endif %}"
)


def test_a_chat_stands_in_the_template_with_the_answer_s_opening_behind_it(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    prompt = prompt_of(tokenizer, question="Question: who sat?", answer_prefix="\nAnswer:", group="animals")
    opening = tokenizer.decode(prompt.ids[prompt.opening])
    question = tokenizer.decode(prompt.ids[prompt.question])
    middle = tokenizer.decode(prompt.ids[~(prompt.opening | prompt.question)])
    assert (opening, middle) == ("<s>system: be brief\nuser: ", CONTEXT)
    assert question == "Question: who sat?</s>\nassistant: Answer:"
    # The template's own marks are special tokens, and there is one BOS: the template's.
    assert prompt.ids[0] == tokenizer.bos_token_id
    assert (prompt.ids == tokenizer.bos_token_id).sum() == (prompt.ids == tokenizer.eos_token_id).sum() == 1
    assert tokenizer.decode(prompt.target) == " cat"
    cut = prompt_of(tokenizer, prompt.length - 20, question="Question: who sat?", answer_prefix="\nAnswer:")
    assert tokenizer.decode(cut.ids[cut.opening]) == opening
    assert tokenizer.decode(cut.ids[cut.question]) == question


def test_a_text_to_go_on_with_gets_no_template(tokenizer, monkeypatch):
    plain = prompt_of(tokenizer)
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    assert prompt_of(tokenizer, is_chat=False).ids.tolist() == plain.ids.tolist()
    assert plain.opening.tolist() == [True] + [False] * (plain.length - 1)
