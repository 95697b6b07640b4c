import json
import math

import pytest

from semtoken_hf.evaluation.cells import Cell
from semtoken_hf.evaluation.configuration import EvaluationConfig
from semtoken_hf.evaluation.metrics import (
    by_id,
    collect,
    list_press_cells,
    summarise,
)

TEXT, QUESTIONS = Cell("wikitext", "semtoken", 2.0), Cell("hotpotqa", "semtoken", 2.0)


def records(*rows, **common):
    """Records by id: each row is (nll, scored) or a dict."""
    usual = {"group": "", "tokens": 100, "slots": 50, "kv_bytes": 5000, "read_seconds": 0.01, **common}
    made = [row if isinstance(row, dict) else {"nll": row[0], "scored": row[1]} for row in rows]
    return {f"e{i}": {"id": f"e{i}", **usual, **row} for i, row in enumerate(made)}


# Nats a token: ours 2.5 of (20 + 30) / 20, full 2, none 4.
OURS = records((20.0, 10), (30.0, 10))
FULL = records((15.0, 10), (25.0, 10), slots=100, kv_bytes=10000)
NONE = records((40.0, 10), (40.0, 10), slots=10, kv_bytes=1000)


def test_figures_of_text():
    figures = summarise(TEXT, OURS, FULL, NONE)
    assert figures["examples"] == 2
    assert figures["tokens_per_slot"] == 2.0
    assert (figures["kv_bytes"], figures["kv_share"]) == (5000, 0.5)
    assert figures["nll"] == pytest.approx(2.5)
    assert figures["perplexity"] == pytest.approx(math.exp(2.5))
    assert figures["cost"] == pytest.approx(math.exp(0.5) - 1)
    # Of perplexity: (e^4 - e^2.5) / (e^4 - e^2).
    assert figures["gain_kept"] == pytest.approx((math.e**4 - math.e**2.5) / (math.e**4 - math.e**2))
    assert figures["spread"] == 0  # both examples lose half a nat
    assert figures["score"] is None
    assert figures["answer_kept"] is None
    assert "score_lost" not in figures
    assert "groups" not in figures
    named = {"task": "wikitext", "method": "semtoken", "ratio": 2.0, "checkpoint": None, "ablation": None}
    assert {name: figures[name] for name in named} == named
    assert (figures["title"], figures["task_title"]) == ("SemToken", "WikiText-103")
    assert figures["is_perplexity"] is True


def test_every_scored_token_counts_the_same():
    figures = summarise(TEXT, records((10.0, 2), (10.0, 8)), {}, {})
    assert figures["nll"] == pytest.approx(2.0)


def test_the_spread_is_the_standard_error_of_the_paired_differences():
    ours = records((21.0, 10), (27.0, 10), (30.0, 10))
    full = records((20.0, 10), (25.0, 10), (27.0, 10))
    # Differences 0.1, 0.2, 0.3: deviation 0.1.
    assert summarise(TEXT, ours, full, {})["spread"] == pytest.approx(math.exp(0.1 / 3**0.5) - 1)
    assert "spread" not in summarise(TEXT, records((21.0, 10)), full, {})


def test_truncation_at_the_same_ratio_is_what_it_is_compared_with():
    ours, cut = records((21.0, 10), (27.0, 10), (30.0, 10)), records((22.0, 10), (29.0, 10), (33.0, 10))
    figures = summarise(TEXT, ours, {}, {}, cut)
    assert figures["ahead"] == pytest.approx(0.2)
    assert figures["ahead_spread"] == pytest.approx(0.1 / 3**0.5)
    assert "ahead" not in summarise(TEXT, ours, {}, {})


def test_figures_of_answers():
    ours = records(
        {"nll": 6.0, "scored": 2, "score": 100.0, "question_kept": True, "answer_kept": 0.5},
        {"nll": 2.0, "scored": 2, "score": 0.0, "question_kept": True},
        {"nll": 4.0, "scored": 2, "score": 20.0, "question_kept": True, "answer_kept": 0.0},
    )
    full = records(*({"nll": 2.0, "scored": 2, "score": s} for s in (100.0, 50.0, 30.0)))
    none = records(*({"nll": 8.0, "scored": 2, "score": 0.0} for _ in range(3)))
    figures = summarise(QUESTIONS, ours, full, none)
    assert figures["score"] == 40
    assert figures["score_lost"] == 20
    assert figures["answer_kept"] == 0.25
    assert figures["question_kept"] is True
    # Of likelihood, not of perplexity: (4 - 2) / (4 - 1).
    assert figures["gain_kept"] == pytest.approx(2 / 3)
    assert figures["cost"] == pytest.approx(math.e - 1)
    assert "perplexity" not in figures
    ours["e1"]["question_kept"] = False
    assert summarise(QUESTIONS, ours, full, none)["question_kept"] is False


def test_groups_are_summed_up_by_themselves():
    def rows(scores):
        groups = ("trec", "lcc", "lcc")
        pairs = zip(groups, scores, strict=True)
        return records(*({"nll": s / 10, "scored": 1, "score": s, "group": g} for g, s in pairs))

    figures = summarise(Cell("longbench", "semtoken", 2.0), rows((10, 20, 40)), rows((50, 30, 60)), rows((0, 5, 5)))
    assert figures["score"] == pytest.approx(70 / 3)
    groups = figures["groups"]
    assert list(groups) == ["lcc", "trec"]
    assert [groups[name]["examples"] for name in groups] == [2, 1]
    assert [groups[name]["score"] for name in groups] == [30, 10]
    assert [groups[name]["score_lost"] for name in groups] == [15, 40]
    assert "spread" not in groups["trec"]


@pytest.mark.parametrize("full", [{}, {"e0": FULL["e0"]}])
def test_without_the_full_context_nothing_is_compared(full):
    figures = summarise(TEXT, OURS, full, NONE)
    assert figures["nll"] == pytest.approx(2.5)
    assert not {"cost", "spread", "gain_kept", "kv_share"} & figures.keys()


def test_references_are_taken_of_the_same_examples():
    """An ablation reads some windows, and is compared on these."""
    some = {"e1": OURS["e1"]}
    figures = summarise(Cell("wikitext", "span_4", 2.0, None, "span"), some, FULL, NONE)
    assert figures["cost"] == pytest.approx(math.exp(3.0 - 2.5) - 1)
    assert (figures["ablation"], figures["title"]) == ("span", "spans of at most 4")


def test_an_example_without_a_gold_answer_is_left_out_of_the_likelihood():
    ours = records({"nll": 6.0, "scored": 2, "score": 100.0}, {"score": 0.0})
    figures = summarise(QUESTIONS, ours, ours, ours)
    assert (figures["score"], figures["nll"]) == (50, 3.0)


def test_everything_that_was_measured_is_collected(tmp_path):
    config = EvaluationConfig("tiny", output_dir=str(tmp_path), tasks=["wikitext"], ratios=[2.0], curve_ratios=[2.0])
    press = list_press_cells(config)[0]
    for cell, rows in (
        (Cell("wikitext", "full", None), FULL),
        (Cell("wikitext", "none", None), NONE),
        (Cell("wikitext", "truncation", 2.0), FULL),
        (TEXT, OURS),
        (Cell("wikitext", "span_4", 2.0, None, "span"), {"e1": OURS["e1"]}),
        (press, OURS),
        (Cell("needle", "full", None), FULL),  # not asked for
    ):
        path = cell.path(config.folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    speed = [{"title": "SemToken", "length": 64, "encoder_share": 0.5}]
    metrics = collect(config, speed, [{"title": "long"}])
    assert json.loads((config.folder / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    methods = ["full", "none", "truncation", "semtoken", "span_4", press.method]
    assert [cell["method"] for cell in metrics["cells"]] == methods
    assert metrics["cells"][3] == summarise(TEXT, OURS, FULL, NONE, FULL)
    assert ["ahead" in cell for cell in metrics["cells"]] == [False, False, False, True, True, True]
    assert (metrics["speed"], metrics["long_contexts"]) == (speed, [{"title": "long"}])
    assert len(metrics["alarms"]) == 2  # perplexity and encoder
    assert metrics["config"]["checkpoint"] == "tiny"
    assert {"command", "versions", "machine", "date"} <= metrics["provenance"].keys()


def test_results_are_read_by_id_up_to_half_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    assert by_id(path) == {}
    path.write_text('{"id": "a", "answer": "one\\u2028two"}\n{"id": "b"}\n{"id": "c')
    assert list(by_id(path)) == ["a", "b"]
    # A separator of lines inside an answer is written as it is.
    path.write_text(json.dumps({"id": "a", "answer": "one\u2028two\x85"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert by_id(path)["a"]["answer"] == "one\u2028two\x85"
