"""Tokens by which a text is cut into sentences, lines and turns: `SemTokenConfigMixin.text_markers`."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..question_finding import is_sentence_end
from ..tokenization_semtoken_fast import special_token_ids
from .vocabulary import token_texts

USER_TEXTS = ("Seven", "Nine")
ASSISTANT_TEXT, SYSTEM_TEXT = "Eight", "Six"


def text_markers(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> dict[str, list[int]]:
    """The markers of a tokenizer, as lists of ids below `vocab_size`.

    Returns:
        `sentence_ends`: end marks, also before a closing quotation mark or bracket, line breaks and special tokens.
        `line_breaks`: tokens with a line break.
        `turn_opening`, `turn_ending`: what the chat template puts before and behind the text of a user; empty without
        a template, or where it puts nothing there that every turn has.
    """
    texts = list(enumerate(token_texts(tokenizer)))
    breaks = [i for i, text in texts if "\n" in text]
    ends = {i for i, text in texts if is_sentence_end(text)}
    opening, ending = user_turn(tokenizer)
    markers = {
        "sentence_ends": sorted({*ends, *breaks, *special_token_ids(tokenizer)}),
        "line_breaks": breaks,
        "turn_opening": opening,
        "turn_ending": ending,
    }
    cut = {name: [i for i in ids if i < vocab_size] for name, ids in markers.items()}
    whole = len(cut["turn_opening"]) == len(opening) and len(cut["turn_ending"]) == len(ending)
    return cut if whole else {**cut, "turn_opening": [], "turn_ending": []}


def user_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids that stand before and behind the text of every user turn of a rendered chat, first and last turns alike."""
    if not tokenizer.chat_template:
        return [], []
    first, second = USER_TEXTS
    turns = [{"role": "user", "content": first}, {"role": "assistant", "content": ASSISTANT_TEXT}]
    turns.append({"role": "user", "content": second})
    system = [{"role": "system", "content": SYSTEM_TEXT}]
    before: list[list[int]] = []
    behind: list[list[int]] = []
    for messages in (turns, system + turns, turns[:1]):
        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        except TemplateError:  # such as a template without a system role
            continue
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        for content in USER_TEXTS[: sum(message["role"] == "user" for message in messages)]:
            if content not in text:  # the template writes it in another way
                return [], []
            start = text.index(content)
            sides = _sides(encoding, start, start + len(content))
            before.append(sides[0])
            behind.append(sides[1])
    opening, ending = _common([ids[::-1] for ids in before])[::-1], _common(behind)
    # The end of another turn is not the beginning of this one.
    follows = bool(ending) and opening[: len(ending)] == ending
    return opening[len(ending) :] if follows else opening, ending


def _sides(encoding: Any, start: int, end: int) -> tuple[list[int], list[int]]:
    """The ids before character `start` and from character `end` on."""
    pairs = list(zip(encoding["input_ids"], encoding["offset_mapping"], strict=True))
    return [i for i, (_, last) in pairs if last <= start], [i for i, (first, _) in pairs if first >= end]


def _common(sequences: list[list[int]]) -> list[int]:
    """What all sequences begin with."""
    columns = takewhile(lambda column: len(set(column)) == 1, zip(*sequences, strict=False))
    return [column[0] for column in columns]


__all__ = ["text_markers", "user_turn"]
