import json

import pytest
import torch

from semtoken_hf.evaluation import cells
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


def test_a_cell_has_a_file_of_its_own(tmp_path):
    paths = {
        Cell("qmsum", "full", None): "cells/qmsum/full@all.jsonl",
        Cell("qmsum", "semtoken", 2.0, "bert"): "cells/qmsum/semtoken.bert@2.jsonl",
        Cell("wikitext", "span_4", 4.0, None, "span"): "ablations/wikitext/span_4@4.jsonl",
    }
    assert {cell: cell.path(tmp_path) for cell in paths} == {cell: tmp_path / path for cell, path in paths.items()}


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


@pytest.mark.parametrize(("whole_lines", "tail"), [(0, "junk\n"), (3, '{"id": "window-')])
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
