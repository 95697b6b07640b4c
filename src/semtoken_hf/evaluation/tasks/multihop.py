"""Questions whose answer needs several paragraphs: HotpotQA (1809.09600) and MuSiQue (2108.00573)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..prompts import Example, Prompt
from .base import TaskSettings, TextTask
from .longbench import official_score
from .sources import first_of, read_rows

# LongBench's words for both data sets.
INSTRUCTION = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words."
)


@dataclass
class MultiHop(TextTask):
    """F1 over words between the answer and the best gold answer, as SQuAD and LongBench count it."""

    uses_lm_eval: ClassVar[bool] = True

    def examples(self, source: str, settings: TaskSettings) -> list[Example]:
        return [self._example(row) for row in read_rows(source, self.hub_name, split="validation")]

    def _example(self, row: dict[str, Any]) -> Example:
        passages = "\n".join(
            f"Passage {i}:\n{title}\n{text}" for i, (title, text) in enumerate(passages_of(row), start=1)
        )
        context = f"{INSTRUCTION}\n\nThe following are given passages.\n{passages}\n\n{INSTRUCTION}\n\n"
        question = f"Question: {row['question']}"
        return Example(str(row["id"]), context, question, answers_of(row), answer_prefix="\nAnswer:")

    def score(self, answer: str, prompt: Prompt) -> float:
        return official_score("hotpotqa", answer, prompt.answers)


def answers_of(row: dict[str, Any]) -> list[str]:
    """Gold answers: a list, or the Hub's single answer and its aliases."""
    answers = first_of(row, ("answers", "answer"))
    return list(answers) if not isinstance(answers, str) else [answers, *row.get("answer_aliases", [])]


def passages_of(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Titles and texts: a list of paragraphs, or HotpotQA's two lists of titles and sentences."""
    if "paragraphs" in row:
        return [(p["title"], first_of(p, ("text", "paragraph_text"))) for p in row["paragraphs"]]
    context = row["context"]
    return [(t, "".join(s)) for t, s in zip(context["title"], context["sentences"], strict=True)]
