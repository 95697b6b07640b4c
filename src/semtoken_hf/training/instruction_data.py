"""Rows that ask about their own text, in the tokenizer's chat template: what a slot has to keep for somebody to use it.

A row is a conversation: a passage, then questions that the passage answers word for word. Either a name or a number is
missing from one of its sentences, or the sentence about something is to be repeated. The sentence always lies in an
earlier chunk than its answer, which therefore sees it through slots alone. All of a row follows from its block.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .adaptation_data import PackedShape, TextBlocks, is_of_share

SENTENCE = re.compile(r"(?<![^\s])[A-Z][^.!?\n]{40,240}[.!?](?=\s)")
NAME_OR_NUMBER = re.compile(r"(?<=[ (])(?:[A-Z][\w'-]{2,}(?: [A-Z][\w'-]+)*|\d[\d,.]*\d|\d)(?=[ ,;:)])")
CLOZE = (
    'What is missing from this sentence of the text? "{}"',
    'Fill the gap as in the text above: "{}"',
    'According to the text, what belongs in the gap? "{}"',
)
REPETITION = (
    "Repeat the sentence of the text about {}.",
    "What does the text say about {}? Quote the sentence.",
    "Find the sentence that mentions {} and quote it.",
)
GAP = "____"


def find_questions(passage: str, end: int, generator: np.random.Generator) -> list[tuple[str, str]]:
    """Questions and answers on the sentences of `passage` that end before its character `end`, in random order."""
    found = []
    for match in SENTENCE.finditer(passage, 0, end):
        sentence = match.group()
        facts = list(NAME_OR_NUMBER.finditer(sentence))
        if not facts:
            continue
        fact = facts[generator.integers(len(facts))]
        is_unique = passage.count(fact.group()) == 1
        if is_unique and generator.random() < 0.4:
            found.append((REPETITION[generator.integers(len(REPETITION))].format(fact.group()), sentence))
        else:
            gapped = sentence[: fact.start()] + GAP + sentence[fact.end() :]
            found.append((CLOZE[generator.integers(len(CLOZE))].format(gapped), fact.group()))
    return [found[i] for i in generator.permutation(len(found))]


def instruction_row(tokenizer: Any, input_ids: Tensor, chunk_length: int, generator: np.random.Generator) -> Tensor:
    """A conversation about the text of a block.

    Args:
        tokenizer: with a chat template.
        input_ids: int64 [n], the block; its last quarter makes room for the questions.
        chunk_length: tokens of a chunk.
        generator: of the draws.

    Returns:
        int64 [n]; the block itself where its text has nothing to ask about.
    """
    length, backend = len(input_ids), tokenizer.backend_tokenizer
    room = chunk_length * max(1, length // chunk_length // 4)
    passage = tokenizer.decode(input_ids[: length - room], skip_special_tokens=True).strip()
    alone = tokenizer.apply_chat_template([{"role": "user", "content": passage}], tokenize=False)
    if passage not in alone:
        return input_ids
    start = alone.index(passage)
    offsets = backend.encode(alone, add_special_tokens=False).offsets
    # Whatever is asked, the answer comes behind the passage.
    behind = sum(first < start + len(passage) for first, _ in offsets)
    last_chunk = behind // chunk_length * chunk_length
    questions = find_questions(passage, max(0, offsets[min(last_chunk, behind - 1)][0] - start), generator)
    if not questions:
        return input_ids
    messages: list[dict[str, str]] = []
    ids: list[int] = []
    while len(ids) < length:
        for question, answer in questions:
            content = question if messages else f"{passage}\n\n{question}"
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        ids = backend.encode(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False).ids
    return torch.tensor(ids[:length], dtype=torch.int64)


class InstructionBlocks(Dataset):
    """`TextBlocks` of which an evenly spread share asks about its text.

    Args:
        blocks: the running text.
        tokenizer: with a chat template where `share` is not 0.
        shape: of the packed rows.
        share: of the rows, in [0, 1].
    """

    def __init__(self, blocks: TextBlocks, tokenizer: Any, shape: PackedShape, share: float):
        self.blocks, self.tokenizer, self.shape, self.share = blocks, tokenizer, shape, share

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Any]:
        block = self.blocks[index]
        if is_of_share(index, self.share):
            generator = np.random.default_rng((self.shape.seed, index, 1))
            block["input_ids"] = instruction_row(self.tokenizer, block["input_ids"], self.shape.chunk_length, generator)
        return block
