"""What a task is: prompts with something to score behind them, and how an answer is scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

from ..prompts import Example, Prompt, tokenise
from .sources import spread

# Tokens of the gold answer that are scored: a summary is as telling by its beginning.
TARGET_LIMIT = 64


@dataclass(frozen=True)
class TaskSettings:
    """What the configuration says to every task.

    Attributes:
        source: file, folder or Hub id; None: the task has to make its own data.
        haystack, haystack_name: a text for tasks that hide something in text: a file, or a data set on the Hub and the
            name of its configuration.
        limit: tokens that prompt and answer may have together.
        context_length, target_length: of a perplexity window.
        fraction: of the examples.
        max_new_tokens: no answer is longer.
        seed: of generated data.
    """

    source: str | None
    haystack: str | None
    haystack_name: str | None
    limit: int
    context_length: int
    target_length: int
    fraction: float
    max_new_tokens: int
    seed: int


@dataclass
class Task(ABC):
    """A task.

    Attributes:
        title: for tables.
        metric: what `score` measures, as a column says it.
        file: name inside the data folder; None: the task makes its own data.
        hub_id, hub_name: where the data is if there is no such file, and which configuration of it.
        is_perplexity: the target is text and not an answer; nothing is generated.
        uses_lm_eval: lm-eval has the prompts or the metric.
    """

    uses_lm_eval: ClassVar[bool] = False

    title: str
    metric: str
    file: str | None = None
    hub_id: str | None = None
    is_perplexity: bool = False
    hub_name: str | None = None

    def lacks(self, settings: TaskSettings) -> str | None:
        """What is missing to make the prompts or to score the answers, or None."""
        if self.uses_lm_eval and find_spec("lm_eval") is None:
            return "lm-eval, which has its metric, is not installed: pip install 'semtoken-hf[evaluate]'"
        if settings.source is not None:
            return None
        hub = f"; on the Hub it is {self.hub_id}" if self.hub_id else ""
        return f"no data: {self.file} is not in --data-dir, and --sources names none{hub}"

    def require(self, settings: TaskSettings) -> None:
        """Raise ValueError if anything is lacking."""
        if lacking := self.lacks(settings):
            raise ValueError(f"{self.title}: {lacking}")

    @abstractmethod
    def prompts(self, tokenizer: Any, settings: TaskSettings) -> list[Prompt]:
        """The task's prompts, a `fraction` of them, the same ones every time.

        Raises:
            ValueError: something is lacking.
        """

    def answer_tokens(self, prompt: Prompt) -> int:
        """Tokens that an answer may have; 0: nothing is generated."""
        return 0

    def is_complete(self, answer: str, prompt: Prompt) -> bool:
        """Whether an answer needs no more text."""
        return False

    def score(self, answer: str, prompt: Prompt) -> float:
        """Score of a generated answer, 0 to 100."""
        raise NotImplementedError


@dataclass
class TextTask(Task):
    """A task of questions about texts, one line each unless a subclass says otherwise."""

    tokens: int = 32

    @abstractmethod
    def examples(self, source: str, settings: TaskSettings) -> list[Example]:
        """All examples of the source."""

    def prompts(self, tokenizer: Any, settings: TaskSettings) -> list[Prompt]:
        self.require(settings)
        # Without a gold answer there is nothing to score.
        examples = [e for e in self.examples(str(settings.source), settings) if any(e.answers)]
        examples = spread(examples, settings.fraction)
        reserve = max(settings.max_new_tokens, TARGET_LIMIT)
        return [tokenise(e, tokenizer, settings.limit - reserve, TARGET_LIMIT) for e in examples]

    def answer_tokens(self, prompt: Prompt) -> int:
        return self.tokens

    def is_complete(self, answer: str, prompt: Prompt) -> bool:
        return "\n" in answer.lstrip()
