import math

import pytest
from huggingface_hub import ModelCard

from semtoken_hf.evaluation.report.model_index import model_index, update_card
from tests.fixtures.metrics import make_metrics

CARD = """---
license: apache-2.0
language: en
tags:
- semtoken
model-index:
- name: a-name
  results:
  - task:
      type: text-generation
    dataset:
      type: mmlu
      name: MMLU
    metrics:
    - type: accuracy
      value: 25.1
---

# A card

Before.

<!-- evaluation -->
what an older evaluation said
<!-- /evaluation -->

After \\1 $x.
"""


@pytest.fixture
def card_path(tmp_path):
    path = tmp_path / "some-model" / "README.md"
    path.parent.mkdir()
    path.write_text(CARD)
    return path


def found(results):
    return {
        (r.dataset_name, r.metric_type, r.metric_args.get("tokens_per_slot"), r.metric_args["method"]): r
        for r in results
    }


def test_the_section_is_replaced_and_the_rest_kept(card_path):
    for section in ("first", "## New\n\nsection \\1 $y\n"):
        update_card(card_path, make_metrics(), section)
    card = ModelCard.load(card_path)
    assert "<!-- evaluation -->\n## New\n\nsection \\1 $y\n<!-- /evaluation -->" in card.text
    assert "older" not in card.text
    assert card.text.startswith("\n# A card\n\nBefore.\n")
    assert card.text.endswith("\nAfter \\1 $x.\n")
    assert (card.data.license, card.data.language, card.data.tags) == ("apache-2.0", "en", ["semtoken"])
    assert [p.name for p in card_path.parent.iterdir()] == ["README.md"]


def test_the_model_index_is_read_again(card_path):
    metrics = make_metrics()
    update_card(card_path, metrics, "a")
    update_card(card_path, metrics, "b")
    data = ModelCard.load(card_path).data
    assert data.model_name == "a-name"
    assert [r.metric_value for r in data.eval_results if r.dataset_name == "MMLU"] == [25.1]
    results = found(r for r in data.eval_results if r.dataset_name != "MMLU")
    assert len(data.eval_results) == 1 + len(results)
    wanted = {}
    for cell in metrics["cells"]:
        if cell["method"] in ("full", "semtoken"):
            key = (cell["ratio"], cell["method"])
            if cell["is_perplexity"]:
                wanted[(cell["task_title"], "perplexity", *key)] = cell["perplexity"]
            else:
                kind = {"F1": "f1", "found": "accuracy"}[cell["metric"]]
                wanted[(cell["task_title"], kind, *key)] = cell["score"]
                wanted[(cell["task_title"], "nll", *key)] = cell["nll"]
    assert {key: r.metric_value for key, r in results.items()} == {k: round(v, 4) for k, v in wanted.items()}
    assert (
        results["WikiText-103", "perplexity", 2.4, "semtoken"].metric_name
        == "perplexity, SemToken at 2.4 tokens per slot"
    )
    assert results["WikiText-103", "perplexity", None, "full"].dataset_type == "Salesforce/wikitext"


def test_what_is_missing_is_left_out():
    metrics = make_metrics()
    for cell in metrics["cells"]:
        cell |= {"score": None, "nll": math.nan}
    (index,) = model_index(metrics, "a-name")
    assert index["name"] == "a-name"
    assert [r["dataset"]["name"] for r in index["results"]] == ["WikiText-103"]
    assert [m["type"] for m in index["results"][0]["metrics"]] == ["perplexity"] * 3


def test_a_card_without_a_model_index_is_named_after_its_folder(card_path):
    card_path.write_text("---\nlicense: mit\n---\n<!-- evaluation --><!-- /evaluation -->\n")
    update_card(card_path, {**make_metrics(), "cells": []}, "a")
    assert card_path.read_text() == "---\nlicense: mit\n---\n<!-- evaluation -->\na\n<!-- /evaluation -->\n"
    update_card(card_path, make_metrics(), "a")
    assert ModelCard.load(card_path).data.model_name == "some-model"


@pytest.mark.parametrize("text", ["# A card", "<!-- /evaluation --> <!-- evaluation -->"])
def test_a_card_without_markers_is_refused(card_path, text):
    card_path.write_text(text)
    with pytest.raises(ValueError, match="<!-- evaluation --> and <!-- /evaluation -->"):
        update_card(card_path, make_metrics(), "a")
    assert card_path.read_text() == text
