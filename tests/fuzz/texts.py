"""The tokenizer that plans: any text, padding, truncation, pairs, chats; and vocabularies of another model."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from semtoken_hf import SpanPlanner
from tests.fixtures.tiny import VOCAB_SIZE, tiny_model, tiny_tokenizer

from . import hostile
from .calls import ODD_RATIOS, RATIOS
from .judging import Family, require

# Surrogates, control characters, combining marks, right-to-left, the sentinels of `chat_semtoken.py`.
odd_characters = st.characters() | st.sampled_from(
    "\x00\ud800\udfff\u202e\u0301\ufeff\ue000\ue001\U0001f468\u200d\n\t "
)
plain_text = st.text(alphabet=st.sampled_from("the cat sat on a mat. \n"), max_size=300)
odd_text = st.text(alphabet=odd_characters, max_size=40)
text = plain_text | st.text(max_size=60) | odd_text | st.sampled_from(["", " ", "<s>", "</s><pad>", "the " * 400])
ODD_TEXT = st.sampled_from([None, 3, b"bytes", {"a": 1}, [1, 2], [None], [["a"], None], object, 1.5])
OPTIONS: dict[str, Any] = {
    "padding": st.sampled_from([True, False, "longest", "max_length"]),
    "truncation": st.sampled_from([True, False, "longest_first", "only_first"]),
    "max_length": st.integers(1, 64) | st.none(),
    "padding_side": st.sampled_from(["left", "right"]),
    "pad_to_multiple_of": st.integers(1, 16),
    "add_special_tokens": st.booleans(),
    "return_tensors": st.sampled_from(["pt", "np"]),
    "return_attention_mask": st.booleans(),
    "return_offsets_mapping": st.booleans(),
    "return_token_type_ids": st.booleans(),
    "return_overflowing_tokens": st.just(True),
    "stride": st.integers(0, 8),
    "is_split_into_words": st.just(False),
}
ODD_OPTIONS: dict[str, Any] = {
    "padding": st.sampled_from(["no such padding", 3]),
    "truncation": st.sampled_from(["no such truncation", 3]),
    "max_length": st.sampled_from([-1, "3", 2.5]),
    "padding_side": st.sampled_from(["up", 3]),
    "return_tensors": st.sampled_from(["no such framework", 3]),
}
OWN = ("return_span_ids", "return_protected_mask", "target_ratio")


@functools.cache
def tokenizers() -> tuple[Any, Any, Any]:
    """Ours with a planner, its plain twin, and one of another model, whose vocabulary is larger than the planner's."""
    ours, plain = tiny_tokenizer(), PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    for name in ("pad_token", "bos_token", "eos_token", "padding_side"):
        setattr(plain, name, getattr(ours, name))
    ours.planner = SpanPlanner.from_model(tiny_model(min_prompt_length=8))
    other = tiny_tokenizer()
    other.add_tokens([*(f"<{i}>" for i in range(VOCAB_SIZE)), "the cat", "mat", "a"])
    other.planner = ours.planner
    for tokenizer in (ours, plain, other):
        tokenizer.model_max_length = 2000
    return ours, plain, other


@dataclass(frozen=True)
class Case:
    texts: Any
    pair: Any
    options: dict[str, Any]
    own: dict[str, Any]
    odd: tuple[str, ...] = ()
    is_other: bool = False


@st.composite
def cases(draw: Any) -> Case:
    odd = draw(st.sampled_from([None] * 6 + ["text", "option", "target_ratio"]))
    texts = draw(text | st.lists(text, max_size=4))
    options = {n: draw(OPTIONS[n]) for n in draw(st.lists(st.sampled_from(list(OPTIONS)), unique=True, max_size=5))}
    pair = draw(text) if isinstance(texts, str) and draw(st.integers(0, 7)) == 0 else None
    own = {"return_span_ids": draw(st.booleans()), "return_protected_mask": draw(st.booleans())}
    names = []
    if odd == "text":
        texts, names = draw(ODD_TEXT | st.lists(text | ODD_TEXT, min_size=1, max_size=3)), ["text"]
    if odd == "option":
        name = draw(st.sampled_from(list(ODD_OPTIONS)))
        options[name], names = draw(ODD_OPTIONS[name]), [name]
    if odd == "target_ratio" or draw(st.booleans()):
        own["target_ratio"] = draw(ODD_RATIOS if odd == "target_ratio" else RATIOS)
        names += ["target_ratio"] * (odd == "target_ratio")
    return Case(texts, pair, options, own, tuple(names), draw(st.integers(0, 9)) == 0)


def rows_of(values: Any) -> list[list[int]]:
    """The rows of an output, as lists."""
    values = [row.tolist() if hasattr(row, "tolist") else row for row in values]
    return values if values and isinstance(values[0], (list, tuple)) else [values]


def run(case: Case) -> str:
    ours, plain, other = tokenizers()
    tokenizer = other if case.is_other else ours
    encoding = tokenizer(case.texts, case.pair, **case.options, **case.own)
    if not case.is_other:
        theirs = plain(case.texts, case.pair, **case.options)
        require(set(theirs) == set(encoding) - {"span_ids", "protected_mask"}, "other outputs than the plain tokenizer")
        for name in theirs:
            require(rows_of(theirs[name]) == rows_of(encoding[name]), f"`{name}` differs from the plain tokenizer")
    if not (case.own["return_span_ids"] or case.own["return_protected_mask"]):
        return "plain"
    ids = rows_of(encoding["input_ids"])
    masks = rows_of(encoding["attention_mask"]) if "attention_mask" in encoding else [[1] * len(row) for row in ids]
    marked = rows_of(encoding["protected_mask"]) if "protected_mask" in encoding else None
    if marked is not None:
        whole = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder, *tokenizer.planner.protected_token_ids}
        expected = [[int(m and i in whole) for i, m in zip(*row, strict=True)] for row in zip(ids, masks, strict=True)]
        require(marked == expected, "protected_mask is wrong")
    if not case.own["return_span_ids"]:
        return "marked"
    require("target_ratio" not in case.odd, "accepted `target_ratio`")
    spans = rows_of(encoding["span_ids"])
    require([len(row) for row in spans] == [len(row) for row in ids], "span_ids has another length than input_ids")
    side = case.options.get("padding_side")
    check_padding_later(tokenizer, ids, masks, spans, side if side in ("left", "right") else None)
    for number, (row, mask, plan) in enumerate(zip(ids, masks, spans, strict=True)):
        require([s >= 0 for s in plan] == [bool(m) for m in mask], "span_ids is not -1 exactly at padding")
        tokens = [i for i, m in zip(row, mask, strict=True) if m]
        if not tokens:
            continue
        protected = None if marked is None else [m for m, v in zip(marked[number], mask, strict=True) if v]
        alone = tokenizer.planner.plan(
            torch.tensor([tokens]),
            protected_mask=None if protected is None else torch.tensor([protected]),
            target_ratio=case.own.get("target_ratio"),
        )
        require([s for s in plan if s >= 0] == alone.span_ids[0].tolist(), "the plan of a row differs from its own")
    return "planned"


def check_padding_later(tokenizer: Any, ids: Any, masks: Any, spans: Any, side: str | None) -> None:
    """Rows that are padded as a batch hold -1 where their mask is 0, and nothing else has changed."""
    rows = [
        dict(zip(("input_ids", "attention_mask", "span_ids"), row, strict=True))
        for row in zip(ids, masks, spans, strict=True)
    ]
    longer = len(ids[0]) + 3
    padded = tokenizer.pad(rows[:1], padding="max_length", max_length=longer, padding_side=side)
    (mask,), (plan,) = padded["attention_mask"], padded["span_ids"]
    require(len(plan) == longer, "padded to another length")
    kept = [s for s, m in zip(plan, mask, strict=True) if m]
    require(kept == [s for s, m in zip(spans[0], masks[0], strict=True) if m], "padding has changed the plan")
    require([s >= 0 for s in plan] == [bool(m) for m in mask], "span_ids is not -1 at what was padded")


def names_of(case: Case) -> tuple[str, ...]:
    # Ids of a larger vocabulary are what a planner of another model has to refuse.
    return (*case.odd, *(("input_ids",) if case.is_other else ()))


def run_plain(case: Case) -> None:
    tokenizers()[1](case.texts, case.pair, **case.options)


TEXTS = Family(cases(), run, names_of, run_plain, weight=2)

TEMPLATES = {
    "simple": "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>\n{% endfor %}",
    "strip": "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}{% endfor %}",
    "upper": "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
    "only last": "{{ messages[-1]['content'] }}!",
    "cut": "{% for m in messages %}{{ m['content'][:3] }}|{% endfor %}",
    "twice": "{% for m in messages %}{{ m['content'] }} {{ m['content'] }}{% endfor %}",
    "raises": "{{ raise_exception('no such role') }}",
    "length": "{% for m in messages %}{{ m['content'] | length }}{{ m['content'] }}{% endfor %}",
}
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", ""]) | odd_text, "content": text}
)
odd_messages = st.sampled_from(
    [{}, {"role": "user"}, {"content": "x"}, {"role": 3, "content": None}, None, 3, "text", []]
)
parts = st.fixed_dictionaries(
    {"role": st.just("user"), "content": st.lists(st.fixed_dictionaries({"text": text}), max_size=2)}
)


@dataclass(frozen=True)
class Chat:
    template: str
    conversation: Any
    own: dict[str, bool]
    options: dict[str, Any]
    is_odd: bool


@st.composite
def chats(draw: Any) -> Chat:
    is_odd = draw(st.integers(0, 4)) == 0
    one = st.lists(messages, min_size=1, max_size=4)
    conversation = draw(one | st.lists(one, min_size=1, max_size=2))
    if is_odd:
        conversation = draw(st.lists(messages | odd_messages | parts, max_size=3) | odd_messages | hostile.nested)
    own = {"protect_template": draw(st.booleans()), "mark_question": draw(st.booleans())}
    options = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "padding": st.just(True),
                "return_tensors": st.just("pt"),
                "add_generation_prompt": st.booleans(),
                "tokenize": st.just(False),
                "truncation": st.just(True),
                "max_length": st.integers(1, 40),
            },
        )
    )
    return Chat(draw(st.sampled_from(list(TEMPLATES))), conversation, own, options, is_odd)


def run_chat(case: Chat) -> str:
    tokenizer = tokenizers()[0]
    given = {"chat_template": TEMPLATES[case.template], **case.options}
    encoding = tokenizer.apply_chat_template(case.conversation, **given, **case.own)
    if not any(case.own.values()):
        return "plain"
    is_batched = not isinstance(case.conversation[0], dict)
    chats = case.conversation if is_batched else [case.conversation]
    ids = rows_of(encoding["input_ids"])
    masks = rows_of(encoding["attention_mask"])
    for name, is_asked in (("protected_mask", case.own["protect_template"]), ("query_mask", case.own["mark_question"])):
        require((name in encoding) == is_asked, f"`{name}` is there unasked, or not there")
        if not is_asked:
            continue
        values = rows_of(encoding[name])
        require([len(row) for row in values] == [len(row) for row in ids], f"`{name}` has another length")
        require({v for row in values for v in row} <= {0, 1}, f"`{name}` holds other numbers")
        if name == "query_mask":
            for chat, row in zip(chats, values, strict=True):
                has_user = any(m.get("role") == "user" and m.get("content") for m in chats and chat)
                require(has_user or not any(row), "a question without a user")
        for row, mask in zip(values, masks, strict=True):
            require(all(m or not v for v, m in zip(row, mask, strict=True)), f"`{name}` marks padding")
    return "marked"


def chat_names(case: Chat) -> tuple[str, ...]:
    if not any(case.own.values()):
        return ()
    # The template changes texts, or is not asked for tokens.
    return ("chat template", "`protect_template`")


def plain_chat(case: Chat) -> None:
    tokenizers()[1].apply_chat_template(case.conversation, chat_template=TEMPLATES[case.template], **case.options)


CHATS = Family(chats(), run_chat, chat_names, plain_chat, weight=1)
