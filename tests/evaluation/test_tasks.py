import json
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from semtoken_hf.evaluation.tasks import TASKS
from semtoken_hf.evaluation.tasks.sources import spread
from tests.fixtures.evaluation_data import (
    EMBEDDED,
    LINES,
    PARAGRAPHS,
    ROWS,
    key_values,
    needs_lm_eval,
    settings,
    write_chartqa,
    write_data,
    write_rows,
)
from tests.fixtures.text import PROSE

pytestmark = needs_lm_eval


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def settings_of(data, name, **fields):
    file = TASKS[name].file
    return settings(data / file if file else None, haystack=str(data / str(TASKS["wikitext"].file)), **fields)


def prompts_of(tokenizer, data, name, **fields):
    return TASKS[name].prompts(tokenizer, settings_of(data, name, **fields))


def texts(tokenizer, prompt):
    """Context and question of a prompt as text, without BOS."""
    cut = prompt.length - prompt.question_length
    return tokenizer.decode(prompt.ids[1:cut]), tokenizer.decode(prompt.ids[cut:])


@pytest.mark.parametrize("name", TASKS)
def test_every_task_makes_prompts_that_fit(tokenizer, data, name):
    limit, new = 900, 100
    prompts = prompts_of(tokenizer, data, name, limit=limit, max_new_tokens=new)
    assert len({p.id for p in prompts}) == len(prompts) > 1
    for prompt in prompts:
        assert prompt.ids[0] == tokenizer.bos_token_id
        assert prompt.length + new <= limit
        assert 0 < len(prompt.target) <= 64
        assert prompt.answer.shape == prompt.ids.shape
        assert bool(prompt.question_length) != TASKS[name].is_perplexity
        assert (TASKS[name].answer_tokens(prompt) > 0) != TASKS[name].is_perplexity
    again = prompts_of(tokenizer, data, name, limit=limit, max_new_tokens=new)
    assert [p.ids.tolist() for p in again] == [p.ids.tolist() for p in prompts]


@pytest.mark.parametrize("name", ["wikitext", "hotpotqa", "longbench", "needle"])
def test_a_fraction_is_some_of_the_examples(tokenizer, data, name):
    prompts = {p.id: p for p in prompts_of(tokenizer, data, name)}
    some = prompts_of(tokenizer, data, name, fraction=0.5)
    assert len(some) == round(0.5 * len(prompts))
    assert {p.id for p in some} <= prompts.keys()


@pytest.mark.parametrize("name", ["hotpotqa", "qmsum", "tables", "longbench"])
def test_a_short_limit_leaves_room_for_the_answer_and_keeps_the_question(tokenizer, data, name):
    whole = prompts_of(tokenizer, data, name)
    cut = prompts_of(tokenizer, data, name, limit=64 + 120)
    for long, short in zip(whole, cut, strict=True):
        assert short.length == min(120, long.length)
        assert short.question_length == long.question_length
        assert short.ids[short.question].tolist() == long.ids[long.question].tolist()


def test_perplexity_reads_consecutive_windows(tokenizer, data):
    prompts = prompts_of(tokenizer, data, "wikitext", context_length=50, target_length=20)
    ids = tokenizer(PROSE * 12, add_special_tokens=False)["input_ids"]
    assert len(prompts) == len(ids) // 70
    for i, prompt in enumerate(prompts):
        assert prompt.ids.tolist() == [tokenizer.bos_token_id, *ids[70 * i + 1 : 70 * i + 50]]
        assert prompt.target.tolist() == ids[70 * i + 50 : 70 * i + 70]
    assert not prompts[0].answer.any()
    with pytest.raises(ValueError, match=r"WikiText-103: no data: .* on the Hub it is Salesforce/wikitext"):
        TASKS["wikitext"].prompts(tokenizer, settings())


def test_multi_hop_prompts_number_their_passages(tokenizer, data):
    prompt = prompts_of(tokenizer, data, "hotpotqa")[0]
    context, question = texts(tokenizer, prompt)
    passages = [f"Passage {i}:\n{title}\n{text}" for i, (title, text) in enumerate(PARAGRAPHS, 1)]
    assert "\n".join(passages) in context
    assert question == "Question: Where do those live who heard that Netherfield is let?\nAnswer:"
    assert prompt.answers == ["Longbourn", "in Longbourn"]
    assert tokenizer.decode(prompt.target) == " Longbourn"
    assert "Longbourn" in tokenizer.decode(prompt.ids[prompt.answer])


def test_tables_are_read_as_text(tokenizer, data, tmp_path):
    prompt = prompts_of(tokenizer, data, "tables")[0]
    context, question = texts(tokenizer, prompt)
    assert context.endswith(f"\n\n{LINES}\n\n")
    assert question == "Question: Whose estate is Pemberley?\nAnswer:"
    # A line break inside a cell does not break its line, and several answers are one list.
    rows = [{"question": "?", "table_csv": '"a\nb",c\n"d, e","f ""g"""\n', "answers": ["1", "x y"]}]
    prompt = TASKS["tables"].prompts(tokenizer, settings(write_rows(tmp_path / "t.jsonl", rows)))[0]
    assert 'a b | c\nd, e | f "g"' in texts(tokenizer, prompt)[0]
    assert prompt.answers == ["1, x y"]


def test_chartqa_reads_its_own_layout(tokenizer, data, tmp_path):
    prompts = {p.id: p for p in prompts_of(tokenizer, data, "chartqa")}
    assert list(prompts) == ["test_augmented-0", "test_human-0"]
    context, question = texts(tokenizer, prompts["test_human-0"])
    assert context.endswith("\n\nYear | Share\n1813 | 47.5\n1814 | 12\n\n")
    assert question == "Question: What is the share in 1813?\nAnswer:"
    assert prompts["test_human-0"].answers == ["47.5"]
    folder = write_chartqa(tmp_path / "chartqa")
    (folder / "tables" / "chart_1.csv").rename(folder / "tables" / "chart_2.csv")
    with pytest.raises(FileNotFoundError, match=r"test_augmented.json asks about chart_1.png, .*no .*chart_1\.csv"):
        TASKS["chartqa"].prompts(tokenizer, settings(folder))


@pytest.mark.parametrize("limit", [170, 520, 5000])
def test_key_values_fit_any_limit_and_stay_at_their_depth(tokenizer, tmp_path, limit):
    rows, task = key_values(rows=9, pairs=33), TASKS["kv_retrieval"]
    prompts = task.prompts(tokenizer, settings(write_rows(tmp_path / "kv.jsonl", rows), limit=limit))
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        context, question = texts(tokenizer, prompt)
        pairs = list(json.loads(context[context.index("{") :]).items())
        assert prompt.length <= limit - 64
        assert len(pairs) == 33 or prompt.length > 0.6 * (limit - 64)
        place = pairs.index((row["key"], row["answer"]))
        assert place == pytest.approx(i / 8 * (len(pairs) - 1), abs=0.51)
        assert prompt.group == f"depth {25 * round(4 * i / 8)} %"
        assert question.endswith(f'Key: "{row["key"]}"\nCorresponding value: "')
        assert tokenizer.decode(prompt.target) == row["answer"]
        assert row["answer"] in tokenizer.decode(prompt.ids[prompt.answer])
    assert {p.group for p in prompts} == {f"depth {d} %" for d in (0, 25, 50, 75, 100)}


def test_key_values_are_generated_without_a_file(tokenizer):
    task = TASKS["kv_retrieval"]
    everything = task.prompts(tokenizer, settings(limit=700))
    assert {g: sum(p.group == g for p in everything) for g in {p.group for p in everything}} == {
        f"depth {d} %": 20 for d in (0, 25, 50, 75, 100)
    }
    assert all(prompt.answers[0] in texts(tokenizer, prompt)[0] for prompt in everything)
    other = task.prompts(tokenizer, settings(limit=700, seed=1, fraction=0.05))
    assert not {p.answers[0] for p in everything} & {p.answers[0] for p in other}


def test_a_needle_lies_at_its_depth(tokenizer, data):
    prompts = prompts_of(tokenizer, data, "needle", limit=1500)
    assert len(prompts) == 3 * 5 * 4
    lengths = set()
    for prompt in prompts:
        share, depth, _ = (float(x) for x in prompt.id.removeprefix("needle-").split("-"))
        context, question = texts(tokenizer, prompt)
        magic = prompt.answers[0]
        head, needle = context.split("afterwards.\n")[1].split(" One of the special magic numbers for ")
        city, number, tail = needle.partition(f" is: {magic}.")
        assert number
        assert question.endswith(f"One of the special magic numbers for {city} is:")
        assert len(head) / len(head + tail) == pytest.approx(depth, abs=0.02)
        assert prompt.group == f"depth {100 * depth:.0f} %"
        assert magic in tokenizer.decode(prompt.ids[prompt.answer]).replace(" ", "")
        # Whole words on both sides.
        assert not tail.strip() or tail[0] in " \n"
        assert prompt.length == pytest.approx(share * (1500 - 64), abs=60)
        assert prompt.length <= 1500 - 64
        lengths.add(share)
    assert lengths == {0.3, 0.6, 1.0}
    other = prompts_of(tokenizer, data, "needle", limit=1500, seed=1)
    assert [p.answers for p in other] != [p.answers for p in prompts]


def test_longbench_reads_whole_prompts_and_their_gold(tokenizer, data):
    prompts = {p.id: p for p in prompts_of(tokenizer, data, "longbench")}
    assert list(prompts) == [f"{t}-{i}" for t in ("hotpotqa", "trec", "lcc", "passage_count") for i in (0, 1)]
    for row in ROWS["longbench_mini.jsonl.xz"]:
        prompt = prompts.get(f"{row['task']}-{row['index']}")
        if prompt is not None:
            assert "".join(texts(tokenizer, prompt)) == row["prompt"]
            assert prompt.group == row["task"]
    trec = prompts["trec-0"]
    assert (trec.answers, trec.facts["all_classes"]) == (["Person"], ["Person", "Reason", "Date"])
    assert "Who let Netherfield?\nAnswer:" in texts(tokenizer, prompts["hotpotqa-0"])[1]
    assert tokenizer.decode(prompts["lcc-1"].target) == "    return x"
    chinese = prompts_of(tokenizer, data, "longbench_zh")
    assert {p.group for p in chinese} == {"multifieldqa_zh"}
    assert tokenizer.decode(chinese[0].target) == "彭伯里。"


def test_longbench_keeps_the_question_whole(tokenizer, tmp_path):
    text, tail = PROSE.replace("\n", " "), "Question:\nWhat can't he drive?\nAnswer:\n"
    rows = [{"task": "triviaqa", "index": 0, "prompt": f"Read.\n\n{text}\n{tail}", "gold": ["x"]}]
    prompt = TASKS["longbench"].prompts(tokenizer, settings(write_rows(tmp_path / "l.jsonl", rows)))[0]
    assert tail in texts(tokenizer, prompt)[1]


@pytest.mark.parametrize(
    ("count", "fraction", "places"),
    [(10, 1.0, range(10)), (10, 0.3, (0, 3, 6)), (10, 0.01, (0,)), (0, 1.0, ())],
)
def test_a_fraction_is_evenly_spaced(count, fraction, places):
    assert spread(list(range(count)), fraction) == list(places)


@pytest.mark.parametrize(("text", "done"), [("\n\n Darcy", False), ("Darcy\n", True)])
def test_an_answer_ends_with_its_line(tokenizer, data, text, done):
    prompt = prompts_of(tokenizer, data, "hotpotqa")[0]
    for name in ("hotpotqa", "tables", "qmsum", "needle"):
        assert TASKS[name].is_complete(text, prompt) == done
    # LongBench stops only where its own task does: trec at any line break, passage_count nowhere.
    assert TASKS["longbench"].is_complete(text, replace(prompt, group="trec")) == ("\n" in text)
    assert not TASKS["longbench"].is_complete(text, replace(prompt, group="passage_count"))
