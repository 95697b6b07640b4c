import json
import shutil

import pytest
import torch

from semtoken_hf.evaluation import cells
from semtoken_hf.evaluation.ablations import ABLATIONS
from semtoken_hf.evaluation.cells import Cell, list_cells, load_model, load_prompts, run_cell, run_cells, why_not
from semtoken_hf.evaluation.configuration import EvaluationConfig
from semtoken_hf.evaluation.methods import METHODS
from semtoken_hf.evaluation.tasks import TASKS
from tests.fixtures.evaluation_data import needs_lm_eval, write_checkpoint, write_data
from tests.fixtures.tiny import BERT


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def with_bert(tmp_path_factory):
    """The same language model with another encoder."""
    encoder = {**BERT, "max_position_embeddings": 256}
    return write_checkpoint(tmp_path_factory.mktemp("other") / "bert", encoder_config=encoder, encoder_window=64)


@pytest.fixture
def config_of(checkpoint, data, tmp_path):
    def make(**fields):
        usual = {
            "data_dir": str(data),
            "output_dir": str(tmp_path / "results"),
            "tasks": ["wikitext"],
            "methods": ["semtoken"],
            "ablations": ["none"],
            "ratios": [2.0],
            "curve_ratios": [2.0, 4.0],
            "context_length": 60,
            "target_length": 8,
            "max_new_tokens": 4,
            "fraction": 0.25,
        }
        return EvaluationConfig(**{"checkpoint": str(checkpoint), **usual, **fields})

    return make


def lines(path):
    """Records of a file, without what no two runs share."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in record.items() if k != "read_seconds"} for record in records]


def test_cells_are_tasks_by_methods_by_ratios(config_of):
    config = config_of(tasks=["all"], methods=["all"], ratios=[2.0, 3.0], curve_ratios=[2.0, 2.5, 4.0])
    found = list_cells(config)
    assert len({cell.path(config.folder) for cell in found}) == len(found)
    for task in TASKS:
        for name, method in METHODS.items():
            ratios = {c.ratio for c in found if (c.task, c.method) == (task, name)}
            wanted = {2.0, 2.5, 4.0} if TASKS[task].is_perplexity else {2.0, 3.0}
            assert ratios == (wanted if method.has_budget else {None})


def test_ablations_are_read_on_text_at_the_first_ratio(config_of):
    config = config_of(tasks=["all"], methods=["full"], ablations=["all"], ratios=[3.0, 2.0], checkpoints=["b=x"])
    found = [cell for cell in list_cells(config) if cell.ablation]
    assert {cell.task for cell in found} == {name for name, task in TASKS.items() if task.is_perplexity}
    assert {cell.ablation for cell in found} == set(ABLATIONS)
    for cell in found:
        assert cell.ratio == (3.0 if ABLATIONS[cell.ablation][cell.method].has_budget else None)
    # An encoder's windows are those of the further checkpoints, where this one's encoder has none.
    assert {cell.checkpoint for cell in found if cell.ablation == "window"} == {"b"}
    assert {cell.checkpoint for cell in found if cell.ablation == "radius"} == {None, "b"}
    assert {cell.checkpoint for cell in found if cell.ablation == "span"} == {None}
    some = list_cells(config_of(methods=["full"], ablations=["span"]))
    assert [cell.method for cell in some if cell.ablation] == list(ABLATIONS["span"])
    assert all(len({v.title for v in group.values()}) == len(group) for group in ABLATIONS.values())


@pytest.mark.parametrize(
    ("cell", "path"),
    [
        (Cell("qmsum", "full", None), "cells/qmsum/full@all.jsonl"),
        (Cell("qmsum", "semtoken", 2.4), "cells/qmsum/semtoken@2.4.jsonl"),
        (Cell("qmsum", "semtoken", 2.0, "bert"), "cells/qmsum/semtoken.bert@2.jsonl"),
        (Cell("wikitext", "span_4", 4.0, None, "span"), "ablations/wikitext/span_4@4.jsonl"),
    ],
)
def test_a_cell_has_a_file_of_its_own(tmp_path, cell, path):
    assert cell.path(tmp_path) == tmp_path / path


def test_a_cell_reads_every_window_of_its_task(config_of):
    config = config_of()
    cell = Cell("wikitext", "semtoken", 2.0)
    run_cell(config, cell)
    prompts, records = load_prompts(config, "wikitext"), lines(cell.path(config.folder))
    assert [record["id"] for record in records] == [prompt.id for prompt in prompts]
    assert len(records) > 5
    model = load_model(config.checkpoint)
    for record, prompt in zip(records, prompts, strict=True):
        prefill = METHODS["semtoken"].read(model, prompt, 30)
        assert record["slots"] == prefill.slots == 30
        with torch.no_grad():
            ids = torch.cat([prompt.ids, prompt.target])[None]
            labels = ids.clone()
            labels[:, :60] = -100
            loss = model(ids, labels=labels, target_ratio=2.0).loss.item()
        assert record["nll"] == pytest.approx(8 * loss, rel=1e-4)
        assert (record["tokens"], record["scored"], record["group"]) == (60, 8, "")
        assert record["kv_bytes"] == 30 * 2 * 2 * 2 * 16 * 4
        assert "answer" not in record
    assert not list(config.folder.rglob("*.partial"))


@needs_lm_eval
def test_a_cell_of_questions_holds_their_answers(config_of):
    config = config_of(tasks=["hotpotqa"], fraction=1.0)
    for method in ("full", "none"):
        run_cell(config, Cell("hotpotqa", method, None))
    full, none = (lines(Cell("hotpotqa", method, None).path(config.folder)) for method in ("full", "none"))
    for record in full + none:
        assert record["question_kept"] is True
        assert 0 <= record["score"] <= 100
        assert isinstance(record["answer"], str)
    assert [record["answer_kept"] for record in full] == [1.0, 1.0]
    assert [record["answer_kept"] for record in none] == [0.0, 0.0]
    assert full[0]["nll"] != none[0]["nll"]


@pytest.mark.parametrize("tail", ["", '{"id": "window-', '{"id": "window-9"}'[:-1], "\n", "junk\n"])
@pytest.mark.parametrize("whole_lines", [0, 1, 3])
def test_a_killed_run_goes_on_where_it_was(config_of, monkeypatch, whole_lines, tail):
    config, cell = config_of(), Cell("wikitext", "truncation", 2.0)
    run_cell(config, cell)
    path = cell.path(config.folder)
    unbroken, text = lines(path), path.read_text().splitlines(keepends=True)
    path.rename(path.with_suffix(".partial"))
    path.with_suffix(".partial").write_text("".join(text[:whole_lines]) + tail)
    read = []
    original = cells.read_prompt
    monkeypatch.setattr(cells, "read_prompt", lambda *a: read.append(1) or original(*a))
    run_cell(config, cell)
    assert lines(path) == unbroken
    assert path.read_text().splitlines(keepends=True)[:whole_lines] == text[:whole_lines]
    assert len(read) == len(unbroken) - whole_lines
    assert not path.with_suffix(".partial").exists()


def test_an_exception_keeps_what_was_read(config_of, monkeypatch):
    config, cell = config_of(), Cell("wikitext", "full", None)
    original, read = cells.read_prompt, []

    def read_prompt(*arguments):
        if len(read) == 2:
            raise KeyboardInterrupt
        read.append(1)
        return original(*arguments)

    monkeypatch.setattr(cells, "read_prompt", read_prompt)
    with pytest.raises(KeyboardInterrupt):
        run_cells(config, [cell])
    path = cell.path(config.folder)
    assert not path.exists()
    assert [record["id"] for record in lines(path.with_suffix(".partial"))] == ["window-0", "window-4"]


def test_finished_cells_are_not_run_again(config_of, monkeypatch):
    config = config_of(methods=["full", "semtoken"])
    found = list_cells(config)
    run_cells(config, found[:2])
    before = {cell: cell.path(config.folder).stat().st_mtime_ns for cell in found[:2]}
    original, again = cells.run_cell, []
    monkeypatch.setattr(cells, "run_cell", lambda config, cell: again.append(cell) or original(config, cell))
    run_cells(config, found)
    assert again == found[2:]
    assert {cell: cell.path(config.folder).stat().st_mtime_ns for cell in found[:2]} == before
    # Not even by itself.
    monkeypatch.setattr(cells, "read_prompt", None)
    original(config, found[0])


@pytest.mark.slow
def test_two_workers_write_what_one_writes(config_of, tmp_path):
    for workers in (1, 2):
        config = config_of(methods=["full", "random"], workers=workers, output_dir=str(tmp_path / str(workers)))
        run_cells(config, list_cells(config))
    found = list_cells(config)
    folder = config.folder.name
    for cell in found:
        one, two = (lines(cell.path(tmp_path / workers / folder)) for workers in "12")
        assert [{**r, "nll": pytest.approx(r["nll"], rel=1e-5)} for r in one] == two


def test_ablations_read_a_quarter_of_the_windows(config_of):
    config = config_of(ablations=["span"], fraction=0.5)
    run_cells(config, list_cells(config))
    everything = lines(Cell("wikitext", "semtoken", 2.0).path(config.folder))
    some = lines(Cell("wikitext", "span_4", 2.0, None, "span").path(config.folder))
    assert len(everything) > 8
    assert [record["id"] for record in some] == [record["id"] for record in everything][::4]


def test_further_checkpoints_are_read_as_semtoken(config_of, with_bert, monkeypatch):
    config = config_of(checkpoints=[f"bert={with_bert}"], curve_ratios=[2.0], ablations=["window"])
    found = list_cells(config)
    assert [(c.method, c.checkpoint) for c in found[:2]] == [("semtoken", None), ("semtoken", "bert")]
    assert {why_not(config, cell) for cell in found} == {None}
    run_cells(config, found)
    usual, other = (lines(cell.path(config.folder)) for cell in found[:2])
    assert [record["id"] for record in usual] == [record["id"] for record in other]
    assert [record["nll"] for record in usual] != [record["nll"] for record in other]


def test_why_a_cell_is_left_out(config_of, checkpoint, tmp_path):
    def reason(cell, **fields):
        return why_not(config_of(**fields), cell)

    assert reason(Cell("wikitext", "full", None)) is None
    nowhere = {"data_dir": str(tmp_path)}
    hotpotqa, qmsum = Cell("hotpotqa", "full", None), Cell("qmsum", "full", None)
    lacking = "is not in --data-dir, and --sources names none"
    hub = "on the Hub it is hotpotqa/hotpot_qa"
    assert reason(hotpotqa, **nowhere) == f"no data: hotpotqa.jsonl.xz {lacking}; {hub}"
    assert reason(hotpotqa, **nowhere, sources=["hotpotqa=x"]) is None
    assert reason(qmsum, **nowhere) == f"no data: qmsum.jsonl.xz {lacking}"
    assert "no learned merger" in reason(Cell("wikitext", "semtoken_learned", 2.0))
    window = Cell("wikitext", "window_32", 2.0, "same", "window")
    assert "static" in reason(window, checkpoints=[f"same={checkpoint}"])


def test_key_values_need_no_file(config_of, tmp_path):
    assert why_not(config_of(data_dir=str(tmp_path)), Cell("kv_retrieval", "full", None)) is None


def test_needles_are_left_out_without_a_haystack(config_of, tmp_path):
    assert why_not(config_of(data_dir=str(tmp_path)), Cell("needle", "full", None)) is not None


def test_windows_beyond_the_encoder_are_left_out(config_of, tmp_path):
    encoder = {**BERT, "max_position_embeddings": 64}
    short = write_checkpoint(tmp_path / "short", encoder_config=encoder, encoder_window=64)
    config = config_of(checkpoints=[f"short={short}"], ablations=["window"], context_length=300)
    fit = [why_not(config, cell) is None for cell in list_cells(config) if cell.ablation]
    assert fit == [True, True, False, False]


def test_prompts_are_those_of_the_configuration(config_of, data, tmp_path):
    """Made once per process, but never another configuration's."""
    first, second = config_of(), config_of(context_length=40)
    assert load_prompts(first, "wikitext") is load_prompts(first, "wikitext")
    assert {p.length for p in load_prompts(second, "wikitext")} == {40}
    assert {p.length for p in load_prompts(first, "wikitext")} == {60}
    other = shutil.copytree(data, tmp_path / "data")
    (other / "wikitext-103" / "test.txt").write_text("Another text. " * 200)
    ids = load_prompts(config_of(data_dir=str(other)), "wikitext")[0].ids
    assert ids.tolist() != load_prompts(first, "wikitext")[0].ids.tolist()
