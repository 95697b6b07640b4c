"""Scores of answers, against values worked out by hand."""

import pytest
import torch

from semtoken_hf.evaluation.prompts import Prompt
from semtoken_hf.evaluation.tasks import TASKS
from semtoken_hf.evaluation.tasks.longbench import official_score
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


@pytest.mark.parametrize("name", ["hotpotqa", "musique"])
@pytest.mark.parametrize(
    ("answer", "answers", "score"),
    [
        ("Fitzwilliam Darcy", ["Fitzwilliam Darcy"], 100),
        # Case, articles and punctuation count for nothing.
        (" the fitzwilliam, darcy.\n", ["Fitzwilliam Darcy"], 100),
        # 1 of 2 words right, 1 of 1 found: 2 * 1/2 * 1 / (3/2).
        ("Darcy Bingley", ["Darcy"], 200 / 3),
        # 2 of 4 right, 2 of 3 found: 2 * 1/2 * 2/3 / (7/6).
        ("he is Fitzwilliam Darcy", ["Mr Fitzwilliam Darcy"], 400 / 7),
        # The best of the gold answers.
        ("Pemberley", ["a large house", "Pemberley"], 100),
        ("Bingley", ["Darcy"], 0),
        ("", ["Darcy"], 0),
    ],
)
def test_f1_of_words(name, answer, answers, score):
    assert TASKS[name].score(answer, prompt_of(answers)) == pytest.approx(score)
    assert longbench("hotpotqa", answer, answers) == pytest.approx(score)


@pytest.mark.parametrize("name", ["qmsum", "booksum"])
@pytest.mark.parametrize(
    ("answer", "answers", "score"),
    [
        ("netherfield is let", ["netherfield is let"], 100),
        # Longest common subsequence "netherfield let": 2 of 3 and 2 of 4: 2 * 2/3 * 1/2 / (7/6).
        ("netherfield now let", ["netherfield is let again"], 400 / 7),
        ("nothing at all", ["netherfield is let", "nothing"], 50),
        ("", ["netherfield is let"], 0),
    ],
)
def test_rouge_l(name, answer, answers, score):
    assert TASKS[name].score(answer, prompt_of(answers)) == pytest.approx(score, abs=1e-3)
    assert longbench("gov_report", answer, answers) == pytest.approx(score, abs=1e-3)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Person", 100),
        ("a Person or a Date", 50),
        ("Date", 0),
        # A class that is part of the right one does not count beside it.
        ("Other location", 100),
    ],
)
def test_classification(answer, score):
    classes = ["Person", "Date", "location", "Other location"]
    gold = ["Other location"] if "location" in answer else ["Person"]
    assert longbench("trec", answer, gold, classes) == pytest.approx(score)


@pytest.mark.parametrize(
    ("subset", "answer", "gold", "score"),
    [
        ("passage_retrieval_en", "Paragraph 7", "Paragraph 7", 100),
        ("passage_retrieval_en", "Paragraph 7 or 8", "Paragraph 7", 50),
        ("passage_retrieval_en", "Paragraph 17", "Paragraph 7", 0),
        ("passage_retrieval_en", "I do not know", "Paragraph 7", 0),
        ("passage_retrieval_zh", "段落7", "段落7", 100),
        ("passage_count", "There are 4.", "4", 100),
        ("passage_count", "4 5 4 6", "4", 50),
        ("passage_count", "44", "4", 0),
        # F1 over the words that jieba cuts: 1 of 2 right, 1 of 1 found.
        ("multifieldqa_zh", "北京", "北京", 100),
        ("multifieldqa_zh", "北京。上海", "北京", 200 / 3),
        ("multifieldqa_zh", "广州", "北京", 0),
        ("vcsum", "我们 讨论", "我们 讨论", 100),
    ],
)
def test_retrieval_count_and_chinese(subset, answer, gold, score):
    assert longbench(subset, answer, [gold]) == pytest.approx(score, abs=1e-3)
    assert official_score(subset, answer, ["段落99 Paragraph 99", gold]) == pytest.approx(score, abs=1e-3)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("return x", 100),
        # Comments and empty lines in front do not count, nor does what follows the first line of code.
        ("\n# a comment\n// another\nreturn x\nreturn y", 100),
        # 7 of the 8 characters of each: 2 * 7 / 16, in whole percent.
        ("return y", 88),
        ("", 0),
    ],
)
@pytest.mark.parametrize("subset", ["lcc", "repobench-p"])
def test_code_similarity(subset, answer, score):
    assert longbench(subset, answer, ["return x"]) == pytest.approx(score)


@pytest.mark.parametrize("name", ["tables", "chartqa"])
@pytest.mark.parametrize(
    ("answer", "gold", "score"),
    [
        ("Darcy", "darcy", 100),
        (" Darcy.\n", "Darcy", 100),
        ("Bingley", "Darcy", 0),
        # Numbers may be 5 % off.
        ("105", "100", 100),
        ("95", "100", 100),
        ("106", "100", 0),
        ("94.9", "100", 0),
        ("10,000", "10000", 100),
        ("$4,000", "4000", 100),
        ("47.5 %", "47.5", 100),
        ("0", "0", 100),
        ("1", "0", 0),
        ("", "Darcy", 0),
        # A list of cells is right as a whole.
        ("Darcy, Bingley", "Darcy, Bingley", 100),
        ("Darcy", "Darcy, Bingley", 0),
    ],
)
def test_relaxed_accuracy(name, answer, gold, score):
    assert TASKS[name].score(answer, prompt_of([gold])) == score


@pytest.mark.parametrize("name", ["kv_retrieval", "needle"])
@pytest.mark.parametrize(("answer", "score"), [("4711", 100), ("It is 4711.", 100), ("4712", 0), ("", 0)])
def test_what_was_hidden_is_found_or_not(name, answer, score):
    assert TASKS[name].score(answer, prompt_of(["4711", "another"])) == score


def test_longbench_has_no_other_task():
    with pytest.raises(ValueError, match=r"no task 'gsm8k'; it has \['2wikimqa'"):
        longbench("gsm8k", "4", ["4"])


@pytest.mark.parametrize("name", [n for n, task in TASKS.items() if task.is_perplexity])
def test_text_has_no_score(name):
    with pytest.raises(NotImplementedError):
        TASKS[name].score("", prompt_of([]))
