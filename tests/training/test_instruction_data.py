"""Rows that ask about their own text: true answers, told by an earlier chunk, the same for the same block."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from semtoken_hf.training.adaptation_data import PackedShape, TextBlocks
from semtoken_hf.training.corpus import BlockSampler
from semtoken_hf.training.instruction_data import CLOZE, GAP, InstructionBlocks, find_questions, instruction_row
from tests.fixtures.tiny import tiny_tokenizer

LENGTH, CHUNK = 2400, 300
NAMES = ("Arden", "Bellamy", "Corvin", "Dorset", "Ellery", "Farrow", "Gilmore", "Harlan")
TEXT = " ".join(
    f"The painter {name} came to the harbour town in {1801 + 7 * i} , and opened a small school for sailors there."
    for i, name in enumerate(NAMES)
)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    return tokenizer


def test_answers_stand_in_the_passage_before_its_end():
    end = TEXT.index("The painter Farrow")
    asked = find_questions(TEXT, end, np.random.default_rng(0))
    assert len(asked) == 5
    for question, answer in asked:
        assert answer in TEXT[:end]
        if GAP in question:
            sentence = question.split('"', 1)[1][:-1]
            assert sentence.replace(GAP, answer) in TEXT[:end]


def test_the_sentence_lies_in_an_earlier_chunk_than_its_answer(tokenizer):
    ids = torch.tensor(tokenizer(TEXT * 5)["input_ids"])[:LENGTH]
    row = instruction_row(tokenizer, ids, CHUNK, np.random.default_rng(1))
    assert (row.shape, row.dtype) == ((LENGTH,), torch.int64)
    text = tokenizer.decode(row)
    answer = text.index("[assistant]")
    chunk_of_answer = len(tokenizer(text[:answer], add_special_tokens=False)["input_ids"]) // CHUNK
    earlier = tokenizer.decode(row[: chunk_of_answer * CHUNK])
    turns = text[answer:].split("[assistant] ")[1:-1]
    assert len(turns) > 2
    assert all(turn.split("\n[user]")[0].strip() in earlier for turn in turns)


def test_a_share_of_the_blocks_is_drawn_by_index(tokenizer):
    ids = np.array(tokenizer(TEXT * 30)["input_ids"], dtype=np.uint32)
    blocks = TextBlocks(BlockSampler({"a": ids}, LENGTH, {}, seed=0), 1, 8)
    shape = PackedShape(LENGTH, CHUNK, (1, 2), 0.0, 1, seed=0)
    data = InstructionBlocks(blocks, tokenizer, shape, 0.5)
    asks = [not torch.equal(data[i]["input_ids"], blocks[i]["input_ids"]) for i in range(len(data))]
    assert asks == [False, True] * 4
    assert torch.equal(data[3]["input_ids"], data[3]["input_ids"])
    assert any(form.split("{}")[0] in tokenizer.decode(data[3]["input_ids"]) for form in CLOZE)
