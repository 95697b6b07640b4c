import pytest
import torch
from tokenizers import decoders
from transformers import AutoTokenizer

from semtoken_hf.evaluation.prompts import Example, Prompt, tokenise
from tests.fixtures.evaluation_data import EMBEDDED
from tests.fixtures.tiny import tiny_tokenizer

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


@pytest.mark.parametrize("room", [1, 2, 7, 40, 41])
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


def test_a_context_that_just_fits_is_not_cut(tokenizer):
    whole = prompt_of(tokenizer)
    assert prompt_of(tokenizer, whole.length).ids.tolist() == whole.ids.tolist()
    assert prompt_of(tokenizer, whole.length - 1).length == whole.length - 1


@pytest.mark.parametrize("short", [0, 1, 30])
def test_a_question_beyond_the_limit_is_an_error(tokenizer, short):
    limit = len(ids_of(tokenizer, QUESTION)) + 1 - short
    with pytest.raises(ValueError, match=f"question of e has .* tokens: no room within {limit}"):
        prompt_of(tokenizer, limit)


def test_the_answer_is_marked_wherever_it_stands(tokenizer):
    prompt = prompt_of(tokenizer, context="dog cat. It said: the cat, twice: catcat!", answers=["cat"])
    assert runs(tokenizer, prompt) == ["cat", "cat", "catcat"]
    assert not prompt.answer[0]
    assert not prompt.answer[prompt.question].any()


def test_every_gold_answer_is_marked_but_no_single_character(tokenizer):
    context = "a dog, and 7 cats by Ann"
    prompt = prompt_of(tokenizer, context=context, answers=["a", "7", "cats", "dog", "Ann", "owl"])
    assert runs(tokenizer, prompt) == ["dog", "cats", "Ann"]
    assert not prompt_of(tokenizer, context=context, answers=[]).answer.any()
    assert not prompt_of(tokenizer, context=context, answers=["", "Dog"]).answer.any()


def test_a_token_that_shares_one_character_is_marked(tokenizer):
    context = "In 1813 Miss Austen of Hampshire wrote of Netherfield Park."
    prompt = prompt_of(tokenizer, context=context, answers=["Austen of Hampshire", "therfield"])
    start, end = context.index("Austen"), context.index("Hampshire") + len("Hampshire")
    other = context.index("therfield")
    offsets = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    wanted = [(a < end and b > start) or (a < other + 9 and b > other) for a, b in offsets]
    assert prompt.answer[1 : 1 + len(wanted)].tolist() == wanted
    assert 2 < sum(wanted) < len(wanted)


def test_marks_survive_the_cut_with_their_tokens(tokenizer):
    filler = "and the dog ran on the mat " * 10
    context = f"Lima. {filler}Lima. {filler}by Lima"
    whole = prompt_of(tokenizer, context=context, answers=["Lima"])
    assert runs(tokenizer, whole) == ["Lima"] * 3
    cut = prompt_of(tokenizer, limit=whole.question_length + 61, context=context, answers=["Lima"])
    assert runs(tokenizer, cut) == ["Lima"] * 2
    ids = ids_of(tokenizer, context)
    assert cut.answer[1:31].tolist() == whole.answer[1:31].tolist()
    assert cut.answer[31:61].tolist() == whole.answer[1 + len(ids) - 30 : 1 + len(ids)].tolist()


@pytest.mark.parametrize(
    ("question", "gold", "scored"),
    [
        ("Answer:", "the cat", " the cat"),
        ("Answer: ", "the cat", "the cat"),
        ("Next line of code:\n", "    the cat", "    the cat"),
        ('Corresponding value: "', "the cat", "the cat"),
        ("回答", "猫", "猫"),
        ("Answer:", "猫", "猫"),
    ],
)
def test_the_target_follows_the_question_with_its_gap(tokenizer, question, gold, scored):
    prompt = prompt_of(tokenizer, question=question, answers=[gold, "another"])
    assert tokenizer.decode(prompt.target) == scored
    assert prompt.target.tolist() == ids_of(tokenizer, scored)
    assert prompt.target.dtype == torch.long


def test_no_answer_is_no_target(tokenizer):
    prompt = prompt_of(tokenizer, answers=[])
    assert prompt.target.shape == (0,)
    assert prompt.answers == []


@pytest.mark.parametrize("limit", [1, 3, 100])
def test_only_the_beginning_of_a_long_answer_is_scored(tokenizer, limit):
    gold = "the dog ran to the man"
    prompt = prompt_of(tokenizer, target_limit=limit, answers=[gold])
    assert prompt.target.tolist() == ids_of(tokenizer, f" {gold}")[:limit]
    assert prompt.answers == [gold]


@pytest.mark.parametrize(
    ("length", "ratio", "slots"),
    [
        (24, 2.4, 10),
        (25, 2.4, 11),
        (24, 1.0, 24),
        (7, 8.0, 1),
        (9, 8.0, 2),
        (2048, 4.0, 512),
        (30, 1.2, 25),
        (21, 1.4, 15),
    ],
)
def test_the_budget_is_what_the_model_counts(length, ratio, slots):
    ids = torch.zeros(length, dtype=torch.long)
    assert Prompt(id="e", ids=ids, question_length=0, target=ids[:0], answer=ids.bool()).budget(ratio) == slots


def test_a_prompt_moves_with_all_its_tensors(tokenizer):
    prompt = prompt_of(tokenizer, group="g")
    moved = prompt.to("meta")
    assert {t.device.type for t in (moved.ids, moved.target, moved.answer, moved.question, moved.place)} == {"meta"}
    assert (moved.id, moved.group, moved.question_length) == ("e", "g", prompt.question_length)
    assert prompt.ids.device.type == "cpu"


@pytest.mark.parametrize("context", ["Élan, 彭伯里。", "\u2028 a\n\n  b ,c", "<unk> @-@ 's"])
def test_a_text_survives_its_tokens(tokenizer, context):
    prompt = prompt_of(tokenizer, context=context)
    assert prompt.round_trip
    assert tokenizer.decode(prompt.ids[1:]) == context + QUESTION


def test_a_text_that_its_tokens_lose_is_known():
    tokenizer = tiny_tokenizer()
    assert prompt_of(tokenizer).round_trip
    # Its tokens then come back with spaces between them.
    tokenizer.backend_tokenizer.decoder = decoders.WordPiece()
    assert not prompt_of(tokenizer).round_trip


def test_a_tokenizer_without_bos_is_an_error():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="BOS"):
        prompt_of(tokenizer)


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


def test_an_answer_without_opening_follows_the_template_without_a_gap(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE.replace("assistant: ", "assistant:\n"))
    assert tokenizer.decode(prompt_of(tokenizer, question="Who sat?").target) == "cat"


def test_a_text_to_go_on_with_gets_no_template(tokenizer, monkeypatch):
    plain = prompt_of(tokenizer)
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    assert prompt_of(tokenizer, is_chat=False).ids.tolist() == plain.ids.tolist()
    assert plain.opening.tolist() == [True] + [False] * (plain.length - 1)
