"""Where a task's rows come from: files in a few formats, and data sets on the Hub (whose columns are stubbed here)."""

import json
import lzma
from functools import partial

import datasets
import pytest
from transformers import AutoTokenizer

from semtoken_hf.evaluation.configuration import EvaluationConfig
from semtoken_hf.evaluation.tasks import TASKS
from semtoken_hf.evaluation.tasks.longbench import CHINESE, SUBSETS
from semtoken_hf.evaluation.tasks.sources import first_of, read_rows, read_text
from tests.fixtures.evaluation_data import CELLS, EMBEDDED, HEADER, LINES, needs_lm_eval, settings, write_rows
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


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.xz", "rows.json", "rows.json.xz"])
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


def test_text_from_the_hub_is_a_column_joined(hub):
    asked, rows = hub
    rows += [{"text": "one \n"}, {"text": ""}, {"text": " two"}]
    assert read_text("owner/text", "name") == "one \n two"
    assert asked == [("owner/text", "name", "test")]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.xz", "text.txt", "folder/text.txt"])
@pytest.mark.parametrize("read", [read_rows, read_text])
def test_a_missing_file_is_an_error_and_no_id_of_the_hub(hub, tmp_path, read, name):
    with pytest.raises(FileNotFoundError, match=f"no file .*{name}: correct the source"):
        read(str(tmp_path / name))
    assert hub[0] == []


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", '{"id": 1}\n{"id": '), ("a.json", '[{"id": 1},')])
def test_a_broken_file_is_an_error_that_names_it(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} holds a line that is not JSON"):
        read_rows(str(tmp_path / name))


def test_a_row_of_another_data_set_is_an_error_that_names_its_columns():
    assert first_of({"a": None, "b": "", "c": 1}, ("a", "b", "c")) == ""
    with pytest.raises(KeyError, match=r"none of the columns \['x', 'y'\], but \['a', 'b'\]"):
        first_of({"b": 1, "a": None}, ("x", "y"))


@pytest.mark.parametrize("name", [n for n in TASKS if n not in ("wikitext", "kv_retrieval", "needle")])
def test_a_task_without_data_says_what_it_needs(tokenizer, name):
    with pytest.raises(ValueError, match=f"{TASKS[name].title}: no data: {TASKS[name].file} is not in --data-dir"):
        TASKS[name].prompts(tokenizer, settings())


@pytest.mark.parametrize("name", TASKS)
def test_without_lm_eval_its_tasks_are_left_out(monkeypatch, name):
    monkeypatch.setattr("semtoken_hf.evaluation.tasks.base.find_spec", lambda module: None)
    lacking = TASKS[name].lacks(settings("source", haystack="text"))
    assert (lacking is None) == (name in ("wikitext", "kv_retrieval", "needle"))
    assert lacking is None or "semtoken-hf[evaluate]" in lacking


def test_wikitext_comes_from_the_hub(tokenizer, hub):
    asked, rows = hub
    rows += [{"text": line + "\n"} for line in PROSE.splitlines()]
    task = TASKS["wikitext"]
    prompts = task.prompts(tokenizer, settings(task.hub_id))
    assert asked == [("Salesforce/wikitext", "wikitext-103-v1", "test")]
    assert tokenizer.decode(prompts[0].ids[1:]) in PROSE


def test_a_needle_is_hidden_in_wikitext_from_the_hub(tokenizer, hub):
    asked, rows = hub
    rows += [{"text": PROSE}] * 4
    config = EvaluationConfig("none", sources=["wikitext=Salesforce/wikitext"], fraction=0.01)
    TASKS["needle"].prompts(tokenizer, config.settings("needle", 1000))
    assert asked == [("Salesforce/wikitext", "wikitext-103-v1", "test")]


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


def test_musique_comes_from_the_hub(tokenizer, hub):
    asked, rows = hub
    paragraph = {"idx": 0, "title": "Longbourn", "paragraph_text": "The Bennets.", "is_supporting": True}
    rows.append(
        {"id": "2hop", "paragraphs": [paragraph], "question": "Who?", "answer": "Ann", "answer_aliases": ["A.", "Anne"]}
    )
    prompts = TASKS["musique"].prompts(tokenizer, settings(TASKS["musique"].hub_id))
    assert asked == [("dgslibisey/MuSiQue", None, "validation")]
    assert prompts[0].answers == ["Ann", "A.", "Anne"]
    assert "Passage 1:\nLongbourn\nThe Bennets.\n" in contexts(tokenizer, prompts)[0]


def test_booksum_comes_from_the_hub(tokenizer, hub):
    asked, rows = hub
    rows += [{"bid": 1, "chapter": f"Chapter {i}.", "summary_text": f"Summary {i}.", "summary": "{}"} for i in (1, 2)]
    prompts = TASKS["booksum"].prompts(tokenizer, settings(TASKS["booksum"].hub_id))
    assert asked == [("kmfoda/booksum", None, "test")]
    assert [(p.id, p.answers) for p in prompts] == [("0", ["Summary 1."]), ("1", ["Summary 2."])]
    assert contexts(tokenizer, prompts)[1].endswith("\n\nChapter 2.\n\n")
    assert questions(tokenizer, prompts) == ["Query: Write a summary of the text.\nAnswer:"] * 2


def test_wikitablequestions_comes_from_the_hub(tokenizer, hub):
    asked, rows = hub
    table = {"header": HEADER, "rows": CELLS, "name": "csv/200-csv/0.csv"}
    rows.append({"id": "nu-0", "question": "Who?", "answers": ["Darcy"], "table": table})
    prompts = TASKS["tables"].prompts(tokenizer, settings(TASKS["tables"].hub_id))
    assert asked == [("stanfordnlp/wikitablequestions", None, "test")]
    assert contexts(tokenizer, prompts)[0].endswith(f"\n\n{LINES}\n\n")
    assert (prompts[0].id, prompts[0].answers) == ("nu-0", ["Darcy"])


@needs_lm_eval
@pytest.mark.parametrize(
    ("name", "subsets"),
    [("longbench", [s for s in SUBSETS if s not in CHINESE]), ("longbench_zh", [*CHINESE])],
)
@pytest.mark.parametrize("column", ["question", "input"])
def test_longbench_comes_from_the_hub_in_its_own_words(tokenizer, hub, name, subsets, column):
    asked, rows = hub
    row = {"_id": "7f", column: "Who let Netherfield?", "context": PROSE, "answers": ["Bingley"], "all_classes": None}
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


@needs_lm_eval
def test_longbench_reads_an_official_file(tokenizer, tmp_path):
    row = {"_id": "7f", "dataset": "hotpotqa", "input": "Who?", "context": PROSE, "answers": ["Bingley"]}
    file = write_rows(tmp_path / "hotpotqa.jsonl", [row | {"all_classes": None, "length": 99, "language": "en"}])
    prompts = TASKS["longbench"].prompts(tokenizer, settings(file))
    assert questions(tokenizer, prompts)[0].endswith("Question: Who?\nAnswer:")
