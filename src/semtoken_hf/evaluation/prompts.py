"""What every method is given: one tokenised prompt, what is scored behind it, and where its answer stands."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Example:
    """A question about a text.

    Attributes:
        id: unique within the task.
        context: the long text, with what the task says before it; this is what may be compressed.
        question: what is asked, and how; read whole by every method.
        answer_prefix: words that open the answer ("Answer:"). In a chat they stand in the assistant's turn.
        answers: gold answers, the first one scored by likelihood.
        group: subset that scores are also averaged over (the LongBench task, the depth of a needle).
        facts: whatever else the task's score reads (`all_classes`).
        is_chat: False for a text to go on with (few-shot examples, code), which gets no chat template.
    """

    id: str
    context: str
    question: str
    answers: list[str]
    group: str = ""
    answer_prefix: str = ""
    is_chat: bool = True
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Prompt:
    """A tokenised prompt.

    Attributes:
        id, group: of the example.
        ids: int64 [n], opened by BOS or the chat template; context, then question.
        opening_length: the first tokens, BOS or what the chat template puts before the user's text, which no method
            may touch.
        question_length: the last tokens, which no method may touch: the question, the end of the chat template and
            the words that open the answer.
        target: int64 [t], what is scored behind the prompt.
        answer: bool [n], tokens of the context in which a gold answer stands verbatim.
        round_trip: whether decoding gives back the text, whatever its language.
        answers, facts: of the example.
    """

    id: str
    ids: Tensor
    question_length: int
    target: Tensor
    answer: Tensor
    round_trip: bool = True
    group: str = ""
    answers: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    opening_length: int = 0

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def place(self) -> Tensor:
        """int64 [n]: 0, 1, 2, ..."""
        return torch.arange(self.length, device=self.ids.device)

    @property
    def question(self) -> Tensor:
        """bool [n], True in the question."""
        return self.place >= self.length - self.question_length

    @property
    def opening(self) -> Tensor:
        """bool [n], True in the opening."""
        return self.place < self.opening_length

    def to(self, device: torch.device | str) -> Prompt:
        return replace(self, ids=self.ids.to(device), target=self.target.to(device), answer=self.answer.to(device))

    def budget(self, ratio: float) -> int:
        """Slots at `ratio` tokens per slot: ceil(n / ratio), as the model counts them."""
        return math.ceil(self.length / ratio - 1e-9)


def tokenise(example: Example, tokenizer: Any, limit: int, target_limit: int) -> Prompt:
    """The prompt of an example in at most `limit` tokens, in the tokenizer's chat template if it has one.

    A longer context loses its middle, as LongBench's own harness does it; the question stays whole.

    Raises:
        ValueError: the question leaves no room within `limit`, or the tokenizer has neither BOS nor chat template.
    """

    def ids_of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    opening, ending = frame(example, tokenizer)
    first, question = ids_of(opening), ids_of(example.question + ending)
    room = limit - len(question) - len(first)
    if room < 1:
        raise ValueError(f"the question of {example.id} has {len(question)} tokens: no room within {limit}")
    encoded = tokenizer(example.context, add_special_tokens=False, return_offsets_mapping=True)
    context, offsets = encoded["input_ids"], encoded["offset_mapping"]
    round_trip = tokenizer.decode(context + question) == example.context + example.question + ending
    answer = answer_marks(example, offsets)
    if len(context) > room:
        head, tail = room // 2, room - room // 2
        context = context[:head] + context[-tail:]
        answer = answer[:head] + answer[-tail:]
    return Prompt(
        id=example.id,
        ids=torch.tensor([*first, *context, *question]),
        question_length=len(question),
        target=torch.tensor(ids_of(gold_text(example, ending))[:target_limit], dtype=torch.long),
        answer=torch.tensor([False] * len(first) + answer + [False] * len(question)),
        round_trip=round_trip,
        group=example.group,
        answers=example.answers,
        facts=example.facts,
        opening_length=len(first),
    )


def frame(example: Example, tokenizer: Any) -> tuple[str, str]:
    """What stands before the context and behind the question: the chat template's, or BOS and the answer's opening."""
    if example.is_chat and tokenizer.chat_template is not None:
        user = "the text of the user"
        turn = [{"role": "user", "content": user}]
        opening, _, ending = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True).partition(
            user
        )
        return opening, ending + example.answer_prefix.lstrip()
    if tokenizer.bos_token is None:
        raise ValueError("the tokenizer has no BOS token, which opens every prompt: set `tokenizer.bos_token`")
    return tokenizer.bos_token, example.answer_prefix


def gold_text(example: Example, ending: str) -> str:
    """The first gold answer as it goes on from the prompt: after "Answer:" with a space, after a line break without."""
    gold = next((answer for answer in example.answers if answer), "")
    is_glued = (example.question + ending).endswith(("\n", " ", '"'))
    return gold if is_glued or not gold or not gold[0].isascii() else f" {gold}"


def answer_marks(example: Example, offsets: list[tuple[int, int]]) -> list[bool]:
    """True for every context token that shares a character with a verbatim gold answer."""
    covered = bytearray(len(example.context))
    for answer in example.answers:
        start = example.context.find(answer) if len(answer) > 1 else -1
        while start >= 0:
            covered[start : start + len(answer)] = b"\1" * len(answer)
            start = example.context.find(answer, start + len(answer))
    return [any(covered[first:last]) for first, last in offsets]


__all__ = ["Example", "Prompt", "tokenise"]
