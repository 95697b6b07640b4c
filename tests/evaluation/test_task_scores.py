"""Scores of answers, against values worked out by hand."""

import pytest
import torch

from semtoken_hf.evaluation.prompts import Prompt
from semtoken_hf.evaluation.tasks import TASKS
from tests.fixtures.evaluation_data import needs_lm_eval

pytestmark = needs_lm_eval


def prompt_of(answers, group="", **facts):
    ids = torch.zeros(1, dtype=torch.long)
    return Prompt(
        id="p",
        ids=ids,
        question_length=0,
        target=ids,
        answer=ids.bool(),
        group=group,
        answers=list(answers),
        facts=facts,
    )


def longbench(subset, answer, answers, all_classes=None):
    return TASKS["longbench"].score(answer, prompt_of(answers, subset, all_classes=all_classes))


@pytest.mark.parametrize(
    ("name", "answer", "answers", "score"),
    [
        # F1 of words. Case, articles and punctuation count for nothing; the best of the gold answers counts.
        ("hotpotqa", " the fitzwilliam, darcy.\n", ["a large house", "Fitzwilliam Darcy"], 100),
        # 1 of 2 words right, 1 of 1 found: 2 * 1/2 * 1 / (3/2).
        ("musique", "Darcy Bingley", ["Darcy"], 200 / 3),
        ("musique", "", ["Darcy"], 0),
        # Longest common subsequence "netherfield let": 2 of 3 and 2 of 4: 2 * 2/3 * 1/2 / (7/6).
        ("qmsum", "netherfield now let", ["netherfield is let again"], 400 / 7),
        ("booksum", "", ["netherfield is let"], 0),
        # Relaxed accuracy: numbers may be 5 % off, and a list of cells is right as a whole.
        ("tables", " Darcy.\n", ["darcy"], 100),
        ("tables", "Darcy", ["Darcy, Bingley"], 0),
        ("chartqa", "105", ["100"], 100),
        ("chartqa", "94.9", ["100"], 0),
        ("chartqa", "$4,000", ["4000"], 100),
        ("chartqa", "1", ["0"], 0),
        # Hidden things are found or not.
        ("kv_retrieval", "It is 4711.", ["4711", "another"], 100),
        ("needle", "4712", ["4711", "another"], 0),
    ],
)
def test_answers_are_scored(name, answer, answers, score):
    assert TASKS[name].score(answer, prompt_of(answers)) == pytest.approx(score, abs=1e-3)


@pytest.mark.parametrize(
    ("subset", "answer", "gold", "score"),
    [
        ("hotpotqa", "Darcy Bingley", "Darcy", 200 / 3),
        ("gov_report", "netherfield now let", "netherfield is let again", 400 / 7),
        ("trec", "a Person or a Date", "Person", 50),
        ("passage_retrieval_en", "Paragraph 7 or 8", "Paragraph 7", 50),
        ("passage_count", "4 5 4 6", "4", 50),
        # F1 over the words that jieba cuts: 1 of 2 right, 1 of 1 found.
        ("multifieldqa_zh", "北京。上海", "北京", 200 / 3),
        # A comment in front does not count; 7 of the 8 characters of each: 2 * 7 / 16, in whole percent.
        ("lcc", "# a comment\nreturn y", "return x", 88),
    ],
)
def test_longbench_is_scored_by_its_own_metrics(subset, answer, gold, score):
    assert longbench(subset, answer, [gold], ["Person", "Date"]) == pytest.approx(score, abs=1e-3)


def test_longbench_has_no_other_task():
    with pytest.raises(ValueError, match=r"no task 'gsm8k'; it has \['2wikimqa'"):
        longbench("gsm8k", "4", ["4"])
