"""LongBench (2308.14508): prompts, answer lengths and metrics per task as lm-eval keeps them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from ..prompts import Example, Prompt
from .base import TaskSettings, TextTask
from .sources import first_of, read_rows

CHINESE = ("dureader", "lsht", "multifieldqa_zh", "passage_retrieval_zh", "vcsum")
SUBSETS = (
    "2wikimqa",
    "gov_report",
    "hotpotqa",
    "lcc",
    "multi_news",
    "multifieldqa_en",
    "musique",
    "narrativeqa",
    "passage_count",
    "passage_retrieval_en",
    "qasper",
    "qmsum",
    "repobench-p",
    "samsum",
    "trec",
    "triviaqa",
    *CHINESE,
)
# Few-shot examples and code, which LongBench gives to chat models, too, without a chat template.
PLAIN_TEXT = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
# What opens the question where the official prompt puts no words of its own before it.
OPENINGS = {
    "trec": "Question:",
    "triviaqa": "Question:",
    "samsum": "Dialogue:",
    "lsht": "新闻：",
    "repobench-p": "Next line of code:",
}
# Bytes; of a longer one (a whole news article) only the last line counts as the question.
LONGEST_QUESTION = 1200


class _TaskLoader(yaml.SafeLoader):
    """Reads lm-eval's task files; `!function metrics.f` becomes its name."""


_TaskLoader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


@functools.cache
def official(subset: str) -> dict[str, Any]:
    """lm-eval's definition of a LongBench task: `doc_to_text`, `process_results`, `generation_kwargs`.

    Raises:
        ValueError: LongBench has no such task.
    """
    import lm_eval.tasks.longbench.metrics as metrics

    if subset not in SUBSETS:
        raise ValueError(f"LongBench has no task {subset!r}; it has {sorted(SUBSETS)}")
    # lm-eval ships the definitions beside its metrics.
    file = Path(metrics.__file__).with_name(f"{subset}.yaml")
    return yaml.load(file.read_text(encoding="utf-8"), Loader=_TaskLoader)


def official_score(subset: str, answer: str, answers: list[str], all_classes: list[str] | None = None) -> float:
    """The official metric of a LongBench task, 0 to 100: the best over the gold answers."""
    import lm_eval.tasks.longbench.metrics as metrics

    function = getattr(metrics, official(subset)["process_results"].split(".", 1)[1])
    return 100 * function({"answers": answers, "all_classes": all_classes}, [answer])["score"]


@dataclass
class LongBench(TextTask):
    """All of LongBench, or some of its tasks; the score is the mean of each example's official metric."""

    uses_lm_eval: ClassVar[bool] = True

    subsets: tuple[str, ...] = SUBSETS

    def examples(self, source: str, settings: TaskSettings) -> list[Example]:
        if not Path(source).is_file():
            return [from_official(row, s) for s in self.subsets for row in read_rows(source, s)]
        rows = read_rows(source)
        if rows and "prompt" not in rows[0]:
            return [from_official(row, row["dataset"]) for row in rows if row["dataset"] in self.subsets]
        return [from_prompt(row) for row in rows if row["task"] in self.subsets]

    def answer_tokens(self, prompt: Prompt) -> int:
        return official(prompt.group)["generation_kwargs"]["max_gen_toks"]

    def is_complete(self, answer: str, prompt: Prompt) -> bool:
        return any(stop in answer for stop in official(prompt.group)["generation_kwargs"]["until"])

    def score(self, answer: str, prompt: Prompt) -> float:
        return official_score(prompt.group, answer, prompt.answers, prompt.facts.get("all_classes"))


def from_prompt(row: dict[str, Any]) -> Example:
    """A row of MiniLongBench: the whole prompt, and the gold answers or a dict with the classes as well."""
    gold = row["gold"]
    facts = {"all_classes": gold["all_classes"]} if isinstance(gold, dict) else {}
    answers = gold.get("answers", gold.get("label")) if isinstance(gold, dict) else gold
    return _example(row["prompt"], row["task"], row["index"], list(answers or []), facts)


def from_official(row: dict[str, Any], subset: str) -> Example:
    """A row of the official files: the context and the question in the task's own words."""
    before, _, after = official(subset)["doc_to_text"].partition("{{context}}")
    prompt = before + row["context"] + after.replace("{{question}}", first_of(row, ("input", "question")))
    facts = {"all_classes": list(row["all_classes"])} if row.get("all_classes") else {}
    return _example(prompt, subset, first_of(row, ("_id", "id", "index")), list(row["answers"]), facts)


def _example(prompt: str, subset: str, number: Any, answers: list[str], facts: dict[str, Any]) -> Example:
    context, question = split_question(prompt, subset)
    is_chat = subset not in PLAIN_TEXT
    return Example(f"{subset}-{number}", context, question, answers, subset, facts=facts, is_chat=is_chat)


def split_question(prompt: str, subset: str) -> tuple[str, str]:
    """A whole prompt as context and question: the question opens with the words that the official prompt puts there."""
    words = official(subset)["doc_to_text"].partition("{{context}}")[2].partition("{{question}}")[0].strip()
    opening = OPENINGS.get(subset) or words.rpartition("\n")[2]
    cut = prompt.rfind(opening)
    if cut < 0 or len(prompt[cut:].encode()) > LONGEST_QUESTION:
        cut = prompt.rstrip().rfind("\n") + 1
    return prompt[:cut], prompt[cut:]
