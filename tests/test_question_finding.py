"""The question is found in the last user turn and decides what stays whole."""

from __future__ import annotations

import pytest
import torch

from semtoken_hf.conversion.text_markers import text_markers, user_turn
from semtoken_hf.question_finding import LEAST, MOST, find_question
from tests.conversion.checkpoints import word_tokenizer
from tests.fixtures.tiny import random_ids, tiny_model
from tests.test_granularity import segments_of

BREAK, OPENING, ENDING, STOP = 3, [4, 5], [6], 9
MARKERS = {"sentence_ends": [BREAK, STOP], "line_breaks": [BREAK], "turn_opening": OPENING, "turn_ending": ENDING}
# Lines of the last user turn, by their lengths, and which of them the question is: slices of the turn's tokens. A line
# of negative length ends a sentence.
TURNS = {
    "a short turn is the question": ([20, 30], slice(0, 51)),
    "the last line of a long turn": ([100, 60, 12], slice(162, 174)),
    "a line too short for a question comes with the one before": (
        [150, 9, LEAST - 2],
        slice(151, 151 + 9 + 1 + LEAST - 2),
    ),
    "a short sentence is a question by itself": ([3, 150, -3], slice(155, 158)),
    "a few words behind a paragraph come with the first line": ([14, 150, 3], [*range(15), *range(166, 169)]),
    "the first line, where the last is a paragraph": ([14, 100, MOST + 1], slice(0, 15)),
    "the end of the text, where nothing is short": (
        [MOST + 2, MOST + 1],
        slice(2 * MOST + 4 - MOST // 2, 2 * MOST + 4),
    ),
}


def turn_of(lines: list[int]) -> list[int]:
    rows = [[20 + n] * length if length > 0 else [20 + n] * (-length - 1) + [STOP] for n, length in enumerate(lines)]
    return [token for n, row in enumerate(rows) for token in [BREAK] * (n > 0) + row]


def found_in(ids: list[int], lengths: list[int] | None = None) -> torch.Tensor:
    row = torch.tensor(ids)
    ends = torch.isin(row, torch.tensor(MARKERS["sentence_ends"]))
    return find_question(row, row == BREAK, ends, OPENING, ENDING, segments_of(lengths or [len(ids)]))


@pytest.mark.parametrize("name", TURNS)
def test_which_part_of_the_turn_is_the_question(name: str) -> None:
    lines, wanted = TURNS[name]
    turn = turn_of(lines)
    before = [8] * 5 + OPENING + [15] * 7 + ENDING + [8] * 3 + OPENING
    found = found_in([*before, *turn, BREAK, *ENDING, 8, 8])
    place = range(len(turn))[wanted] if isinstance(wanted, slice) else wanted
    assert found.nonzero().flatten().tolist() == [len(before) + i for i in place]


def test_every_segment_has_its_own_and_a_text_without_a_turn_has_none() -> None:
    chat = [8, *OPENING, 11, 12, *ENDING, 8]
    found = found_in([*chat, *[8] * 9, *chat], [len(chat), 9, len(chat)])
    assert found.nonzero().flatten().tolist() == [3, 4, 19, 20]
    open_turn = found_in([8, *OPENING, 11, 12, 13])
    assert open_turn.nonzero().flatten().tolist() == [3, 4, 5]
    assert not found_in([8] * 30).any()


def test_the_question_of_a_chat_steers_unless_the_call_says_no() -> None:
    """A rare token of the question stands far back as well."""
    model = tiny_model(
        segmentation_mode="sentence", text_markers=MARKERS, max_span_length=64, num_sink_tokens=1, recent_window=1
    )
    ids = random_ids(1, 240).clamp(min=12)
    ids[ids == 250] = 251
    ids[0, 19:220:20] = 9
    ids[0, 225:227], ids[0, 235] = torch.tensor(OPENING), ENDING[0]
    ids[0, 45] = ids[0, 227:235] = 250

    def is_whole(**call) -> torch.Tensor:
        _, index, counts = (
            model.compress(ids, target_ratio=4.0, **call).span_ids[0].unique(return_inverse=True, return_counts=True)
        )
        return (counts == 1)[index]

    asked = is_whole()
    assert asked[40:60].all()
    assert asked[227:235].all()
    assert torch.equal(is_whole(query_mask=find_mask(ids)), asked)
    assert not is_whole(query_weight=0.0)[40:60].any()
    with pytest.raises(ValueError, match="query_weight"):
        model.compress(ids, query_weight=-1.0)
    outputs = model(ids, logits_to_keep=1, query_weight=0.0)
    assert not torch.equal(outputs.span_ids, model(ids, logits_to_keep=1).span_ids)
    first = model.generate(ids, query_weight=0.0, max_new_tokens=1, do_sample=False)[0, -1]
    assert first == outputs.logits[0, -1].argmax()


def find_mask(ids: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros_like(ids)
    mask[0, 227:235] = 1
    return mask


@pytest.mark.parametrize("mask", [torch.ones(1, 5), torch.full((1, 120), 0.5), "question"])
def test_a_wrong_mask_is_refused(mask) -> None:
    with pytest.raises(ValueError, match="query_mask"):
        tiny_model().compress(random_ids(1, 120), query_mask=mask)


def test_conversion_finds_what_ends_a_sentence_a_line_and_a_turn() -> None:
    tokenizer = word_tokenizer(["the", "cat."], ["?!", '."', "a.b"])
    markers = text_markers(tokenizer, len(tokenizer))
    ends = {tokenizer.convert_ids_to_tokens(i) for i in markers["sentence_ends"]}
    assert {".", "?", "Ċ", "Ġcat.", "?!", '."', "</s>", "<|tool|>"} <= ends
    assert not {"a.b", "Ġthe", ",", "Ġ"} & ends
    assert [tokenizer.convert_ids_to_tokens(i) for i in markers["line_breaks"]] == ["Ċ"]
    assert [tokenizer.decode(markers[name]) for name in ("turn_opening", "turn_ending")] == ["user: ", "\n"]
    assert text_markers(tokenizer, 5)["turn_opening"] == []
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('none') }}{% endif %}"
        "{{ '<|tool|>' + m.role + '\n' + m.content + '</s>\n' }}{% endfor %}"
    )
    opening, ending = user_turn(tokenizer)
    assert tokenizer.decode(opening) == "<|tool|>user\n"
    assert tokenizer.decode(ending) == "</s>\n"
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    assert user_turn(tokenizer) == ([], [])
