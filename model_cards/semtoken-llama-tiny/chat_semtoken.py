"""Which tokens of a rendered chat are its messages' own text, and which come from the template.

Each message's text is replaced by a sentinel before rendering, so that a message that says what the template says, such
as "user", cannot be mistaken for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

from .question_finding import question_of_turn

# From a private use area, so that no tokenizer, template or text means anything by it.
SENTINEL = re.compile("\ue000(\\d+)\ue001")


def content_spans(render: Callable[[list[dict]], str], messages: list[dict]) -> list[tuple[int, int, int]]:
    """Where the texts of the messages stand in the rendered chat.

    Args:
        render: messages -> rendered text, by the chat template.
        messages: `role` and `content`, a string or a list of parts with `text`.

    Returns:
        (first character, end, index of the message), in order.

    Raises:
        ValueError: the template changes the texts by more than stripping them.
    """
    contents: list[tuple[int, str]] = []

    def sentinel(number: int, text: str) -> str:
        if not text:  # a template may ask whether there is any
            return text
        contents.append((number, text))
        return f"\ue000{len(contents) - 1}\ue001"

    marked = [_map_texts(message, lambda text, n=n: sentinel(n, text)) for n, message in enumerate(messages)]
    rendered = render(messages)
    pieces = SENTINEL.split(render(marked))
    for change in (str, str.strip, str.rstrip, str.lstrip):
        text, spans = pieces[0], []
        for number, template in zip(pieces[1::2], pieces[2::2], strict=True):
            message, content = contents[int(number)]
            content = change(content)
            spans.append((len(text), len(text) + len(content), message))
            text += content + template
        if text == rendered:
            return spans
    raise ValueError(
        "the chat template changes the text of the messages, so that it is unknown which tokens are theirs: build "
        "`protected_mask` and `query_mask` by hand"
    )


def _map_texts(message: dict, function: Callable[[str], str]) -> dict:
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": function(content)}
    if isinstance(content, (list, tuple)):
        parts = [{**p, "text": function(p["text"])} if isinstance(p.get("text"), str) else p for p in content]
        return {**message, "content": parts}
    return message


def chat_masks(
    offsets: list[tuple[int, int]], spans: list[tuple[int, int, int]], messages: list[dict], rendered: str
) -> tuple[list[int], list[int]]:
    """What each token of a rendered chat belongs to.

    Args:
        offsets: first character and end of each token; empty ones are padding.
        spans: of `content_spans`.
        messages: of the chat.
        rendered: the chat.

    Returns:
        Two lists of 0 and 1: tokens with any character of the template; tokens of the question, which is the last
        user's text or, where that is long, a line of it (see `question_finding.py`).
    """
    last_user = max((n for n, message in enumerate(messages) if message.get("role") == "user"), default=None)
    of_template, of_question = [], []
    for start, end in offsets:
        inside = [(first, last, n) for first, last, n in spans if first < end and start < last]
        covered = sum(min(end, last) - max(start, first) for first, last, _ in inside)
        of_template.append(int(covered < end - start))
        of_question.append(int(any(n == last_user for _, _, n in inside)))
    return of_template, _question_of(of_question, [rendered[start:end] for start, end in offsets])


def _question_of(of_turn: list[int], texts: list[str]) -> list[int]:
    """The question in the tokens of a turn, lists of 0 and 1; `texts` are those of all tokens."""
    if 1 not in of_turn:
        return of_turn
    begin, end = of_turn.index(1), len(of_turn) - of_turn[::-1].index(1)
    ends_line = torch.tensor(["\n" in text for text in texts])
    bounds = (torch.tensor([begin]), torch.tensor([end]))
    return question_of_turn(*bounds, ends_line, torch.zeros(len(of_turn), dtype=torch.long)).long().tolist()


__all__ = ["chat_masks", "content_spans"]
