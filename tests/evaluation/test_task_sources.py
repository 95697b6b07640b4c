"""Where a task's rows come from: files in a few formats, and data sets on the Hub (whose columns are stubbed here)."""

import json
import lzma
from functools import partial

import datasets
import pytest
from transformers import AutoTokenizer

from semtoken_hf.evaluation.tasks import TASKS
from semtoken_hf.evaluation.tasks.longbench import CHINESE, SUBSETS
from semtoken_hf.evaluation.tasks.sources import read_rows, read_text
from tests.fixtures.evaluation_data import EMBEDDED, needs_lm_eval, settings
from tests.fixtures.text import PROSE

ROWS = [{"id": "a", "text": "Ein Wörtchen "}, {"id": "b", "text": "\u2028 mehr"}]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED)


@pytest.fixture
def hub(monkeypatch):
    """What `datasets.load_dataset` was asked for, and the rows that it answers with."""
    asked, rows = [], []

    def load_dataset(path, name=None, split=None):
        asked.append((path, name, split))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked, rows


def contexts(tokenizer, prompts):
    return [tokenizer.decode(p.ids[1 : p.length - p.question_length]) for p in prompts]


def questions(tokenizer, prompts):
    return [tokenizer.decode(p.ids[p.question]) for p in prompts]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json.xz"])
def test_rows_come_from_lines_or_a_list_packed_or_not(tmp_path, name):
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n"
    text = lines if "jsonl" in name else json.dumps(ROWS, ensure_ascii=False)
    opened = lzma.open if name.endswith(".xz") else open
    with opened(tmp_path / name, "wt", encoding="utf-8") as handle:
        handle.write(text)
    assert read_rows(str(tmp_path / name)) == ROWS


@pytest.mark.parametrize("name", ["a.txt", "a.txt.xz"])
def test_text_comes_from_a_file_packed_or_not(tmp_path, name):
    opened = lzma.open if name.endswith(".xz") else partial(open, newline="")
    with opened(tmp_path / name, "wt", encoding="utf-8") as handle:
        handle.write("Ein Wörtchen\u2028\n\nmehr\n")
    assert read_text(str(tmp_path / name)) == "Ein Wörtchen\u2028\n\nmehr\n"


def test_a_missing_file_is_an_error_and_no_id_of_the_hub(hub, tmp_path):
    for read, name in ((read_rows, "rows.jsonl"), (read_text, "folder/text.txt")):
        with pytest.raises(FileNotFoundError, match=f"no file .*{name}: correct the source"):
            read(str(tmp_path / name))
    assert hub[0] == []


def test_a_broken_file_is_an_error_that_names_it(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n{"id": ')
    with pytest.raises(ValueError, match=r"a\.jsonl holds a line that is not JSON"):
        read_rows(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("name", ["hotpotqa", "chartqa"])
def test_a_task_without_data_says_what_it_needs(tokenizer, name):
    with pytest.raises(ValueError, match=f"{TASKS[name].title}: no data: {TASKS[name].file} is not in --data-dir"):
        TASKS[name].prompts(tokenizer, settings())


def test_without_lm_eval_its_tasks_are_left_out(monkeypatch):
    monkeypatch.setattr("semtoken_hf.evaluation.tasks.base.find_spec", lambda module: None)
    lacking = {name: task.lacks(settings("source", haystack="text")) for name, task in TASKS.items()}
    assert {name for name, reason in lacking.items() if not reason} == {"wikitext", "kv_retrieval", "needle"}
    assert all("semtoken-hf[evaluate]" in reason for reason in lacking.values() if reason)


def test_wikitext_comes_from_the_hub(tokenizer, hub):
    asked, rows = hub
    rows += [{"text": line + "\n"} for line in PROSE.splitlines()]
    task = TASKS["wikitext"]
    prompts = task.prompts(tokenizer, settings(task.hub_id))
    assert asked == [("Salesforce/wikitext", "wikitext-103-v1", "test")]
    assert tokenizer.decode(prompts[0].ids[1:]) in PROSE


def test_hotpotqa_comes_from_the_hub(tokenizer, hub):
    asked, rows = hub
    context = {"title": ["Longbourn", "Netherfield"], "sentences": [["The Bennets live here.", " All."], ["Let."]]}
    rows.append({"id": "5a7", "question": "Who?", "answer": "Bingley", "type": "bridge", "context": context})
    prompts = TASKS["hotpotqa"].prompts(tokenizer, settings(TASKS["hotpotqa"].hub_id))
    assert asked == [("hotpotqa/hotpot_qa", "distractor", "validation")]
    assert (prompts[0].id, prompts[0].answers) == ("5a7", ["Bingley"])
    passages = "Passage 1:\nLongbourn\nThe Bennets live here. All.\nPassage 2:\nNetherfield\nLet.\n\n"
    assert passages in contexts(tokenizer, prompts)[0]
    assert questions(tokenizer, prompts) == ["Question: Who?\nAnswer:"]


@needs_lm_eval
@pytest.mark.parametrize(
    ("name", "subsets"),
    [("longbench", [s for s in SUBSETS if s not in CHINESE]), ("longbench_zh", [*CHINESE])],
)
def test_longbench_comes_from_the_hub_in_its_own_words(tokenizer, hub, name, subsets):
    asked, rows = hub
    row = {"_id": "7f", "input": "Who let Netherfield?", "context": PROSE, "answers": ["Bingley"], "all_classes": None}
    rows.append(row | {"all_classes": ["Bingley", "Darcy"]})
    prompts = TASKS[name].prompts(tokenizer, settings(TASKS[name].hub_id))
    assert asked == [("Xnhyacinth/LongBench", subset, "test") for subset in subsets]
    assert [p.group for p in prompts] == subsets
    assert [p.id for p in prompts] == [f"{subset}-7f" for subset in subsets]
    for prompt, context, question in zip(
        prompts, contexts(tokenizer, prompts), questions(tokenizer, prompts), strict=True
    ):
        assert PROSE in context
        assert "{{" not in context + question
        assert (prompt.answers, prompt.facts) == (["Bingley"], {"all_classes": ["Bingley", "Darcy"]})
    if name == "longbench":
        by_group = dict(zip(subsets, questions(tokenizer, prompts), strict=True))
        assert by_group["hotpotqa"] == "Question: Who let Netherfield?\nAnswer:"
        assert by_group["trec"] == "Who let Netherfield?"
        assert by_group["repobench-p"] == "Next line of code:"
        assert "Netherfield" not in by_group["gov_report"]
