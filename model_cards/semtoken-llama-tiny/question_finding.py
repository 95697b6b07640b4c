"""Where the question of a chat stands, if nobody says: at the end of the last turn of the user.

The turn lies between the tokens that the chat template puts before and behind it (found at conversion). A short turn is
the question as a whole; of a long one, which holds a document as well, the last line is, or, where the last line is as
long as a paragraph, the first. A few words that end no sentence, such as "Answer:" or "origin of coffee", come with the
line before them, or with the first line where that one is a paragraph. A text without such a turn asks nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .token_layout import TokenLayout

# In tokens. A last line of fewer than LEAST that ends no sentence is not all of the question.
LEAST, MOST = 8, 128
# Of Latin and of Chinese text.
END_MARKS = (".", "!", "?", "…", "\u3002", "\uff01", "\uff1f")
CLOSING = "\"')]}»”’"


def is_sentence_end(text: str) -> bool:
    """Whether the text of a token ends a sentence, also before a closing quotation mark or bracket."""
    return text.rstrip().rstrip(CLOSING).endswith(END_MARKS)


def find_question(
    input_ids: Tensor,
    ends_line: Tensor,
    ends_sentence: Tensor,
    turn_opening: list[int],
    turn_ending: list[int],
    layout: TokenLayout,
) -> Tensor:
    """The tokens of the question of every segment.

    Args:
        input_ids: int64 [N].
        ends_line, ends_sentence: bool [N], tokens that break the line, and that end a sentence.
        turn_opening: ids that the chat template puts before the text of a user; empty: nothing is found.
        turn_ending: ids that it puts behind it; a turn without them goes on to the end of its segment.
        layout: the segments, which are searched each by itself.

    Returns:
        bool [N].
    """
    segment, place = layout.segment, torch.arange(len(input_ids), device=input_ids.device)
    ends = layout.starts + layout.lengths
    opens = _begins(input_ids, turn_opening, ends[segment])
    begin = _last(opens, segment, ends) + len(turn_opening)
    found = begin >= len(turn_opening)
    end = _first(_begins(input_ids, turn_ending, ends[segment]) & (place >= begin[segment]), segment, ends)
    return question_of_turn(begin, end, ends_line, ends_sentence, segment) & found[segment]


def question_of_turn(begin: Tensor, end: Tensor, ends_line: Tensor, ends_sentence: Tensor, segment: Tensor) -> Tensor:
    """The tokens of the question in the turn from `begin` to before `end`, int64 [S] each, of every segment.

    Args:
        ends_line, ends_sentence: bool [N], tokens that break the line, and that end a sentence.
        segment: int64 [N], segment of each token.

    Returns:
        bool [N].
    """
    place = torch.arange(len(segment), device=segment.device)
    inside = (place >= begin[segment]) & (place < end[segment])
    # Line breaks at the end belong to nothing.
    end = _last(inside & ~ends_line, segment, end) + 1
    inside &= place < end[segment]
    opens_line = inside & ~ends_line
    opens_line[1:] &= ends_line[:-1]
    last_line = _last(opens_line, segment, end).maximum(begin)
    last_lines = _last(opens_line & (end[segment] - place >= LEAST), segment, end).maximum(begin)
    is_question = ends_sentence[(end - 1).clamp(min=0)] | (last_lines == last_line)
    last_lines = last_line.where(is_question, last_lines)
    second_line = _first(opens_line & (place > begin[segment]), segment, end)

    is_short, first_is_short = end - last_lines <= MOST, second_line - begin <= MOST
    start = last_lines.where(is_short, begin.where(first_is_short, end - MOST // 2))
    stop = end.where(is_short | ~first_is_short, second_line)
    is_whole = end - begin <= MOST
    start, stop = begin.where(is_whole, start), end.where(is_whole, stop)
    words = last_line.where(~is_question, end)
    in_lines = (place >= start[segment]) & (place < stop[segment])
    return in_lines | (inside & (place >= words[segment]))


def _begins(input_ids: Tensor, pattern: list[int], end: Tensor) -> Tensor:
    """Where `pattern` begins, and ends before `end` [N]: bool [N]; nowhere if it is empty."""
    found = torch.arange(len(input_ids), device=input_ids.device) + len(pattern) <= end
    for offset, token in enumerate(pattern):
        found &= input_ids.roll(-offset) == token
    return found if pattern else torch.zeros_like(found)


def _last(flags: Tensor, segment: Tensor, like: Tensor) -> Tensor:
    """Place of the last True of each segment, or -1: int64, shaped as `like` [S]."""
    place = torch.arange(len(flags), device=flags.device)
    return torch.full_like(like, -1).scatter_reduce_(0, segment, place.where(flags, -1), "amax")


def _first(flags: Tensor, segment: Tensor, otherwise: Tensor) -> Tensor:
    """Place of the first True of each segment, or `otherwise` [S], whichever is smaller: int64 [S]."""
    place = torch.arange(len(flags), device=flags.device)
    return otherwise.scatter_reduce(0, segment, place.where(flags, len(flags)), "amin")


__all__ = ["find_question", "is_sentence_end", "question_of_turn"]
