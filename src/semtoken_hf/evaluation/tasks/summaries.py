"""Summaries, asked for or of the whole: QMSum (2104.05938) and BookSum (2105.08209)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..prompts import Example, Prompt
from .base import TaskSettings, TextTask
from .longbench import official_score
from .sources import first_of, read_rows

INSTRUCTION = "You are given a text and a question or instruction. Answer it in one or more sentences."
WHOLE = "Write a summary of the text."


@dataclass
class Summaries(TextTask):
    """ROUGE-L (F) between the answer and the best gold summary, as LongBench counts it."""

    uses_lm_eval: ClassVar[bool] = True

    tokens: int = 512

    def examples(self, source: str, settings: TaskSettings) -> list[Example]:
        examples = []
        for i, row in enumerate(read_rows(source)):
            answers = first_of(row, ("answers", "answer", "summary_text", "summary"))
            text = first_of(row, ("context", "chapter", "text"))
            examples.append(
                Example(
                    str(row.get("id", i)),
                    f"{INSTRUCTION}\n\n{text}\n\n",
                    f"Query: {first_of({'whole': WHOLE, **row}, ('question', 'input', 'whole'))}",
                    [answers] if isinstance(answers, str) else list(answers),
                    answer_prefix="\nAnswer:",
                )
            )
        return examples

    def score(self, answer: str, prompt: Prompt) -> float:
        return official_score("qmsum", answer, prompt.answers)
