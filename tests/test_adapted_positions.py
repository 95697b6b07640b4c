"""An adapted checkpoint says when it is used in another position mode than the one it was adapted for."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.fixtures.logs import warnings_of
from tests.fixtures.tiny import random_ids, tiny_model

MODES = ["original", "compact"]


def adapted(used: str, adapted_for: dict | None):
    return tiny_model(merge_mode="learned", position_mode=used, adapted_for=adapted_for)


@pytest.mark.parametrize("used", MODES)
@pytest.mark.parametrize("trained", MODES)
def test_the_other_mode_is_warned_of_once(caplog: pytest.LogCaptureFixture, used: str, trained: str) -> None:
    model, ids = adapted(used, {"position_mode": trained}), random_ids(1, 64)
    for _ in range(2):
        model.generate(ids, max_new_tokens=2)
        model(ids, logits_to_keep=1)
    if used == trained:
        assert not warnings_of(caplog)
    else:
        (message,) = warnings_of(caplog)
        assert f"adapted for position_mode='{trained}'" in message
        assert f"used with '{used}'" in message


def test_the_mode_of_the_call_counts(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = adapted("compact", {"position_mode": "original"}), random_ids(1, 64)
    model.compress(ids, position_mode="original")
    assert not warnings_of(caplog)
    model.compress(ids)
    assert len(warnings_of(caplog)) == 1


@pytest.mark.parametrize("adapted_for", [None, {}, {"trainable": "lora"}])
def test_what_was_adapted_for_no_mode_is_quiet(caplog: pytest.LogCaptureFixture, adapted_for: dict | None) -> None:
    for used in MODES:
        adapted(used, adapted_for)(random_ids(1, 64), logits_to_keep=1)
    assert not warnings_of(caplog)


@pytest.mark.parametrize("arguments", [{"compression": False}, {"target_ratio": 1}, {"logits_to_keep": 0}])
def test_where_nothing_merges_nothing_is_said(caplog: pytest.LogCaptureFixture, arguments: dict) -> None:
    model = adapted("compact", {"position_mode": "original"})
    model(random_ids(1, 64), **{"logits_to_keep": 1, **arguments})
    model.compress(random_ids(1, 12))
    assert not warnings_of(caplog)


def test_it_is_part_of_the_checkpoint(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    facts = {"position_mode": "original", "ratios": [1.5, 6.0], "steps": 300}
    adapted("original", facts).save_pretrained(tmp_path)
    same, other = (AutoModelForCausalLM.from_pretrained(tmp_path, **a) for a in ({}, {"position_mode": "compact"}))
    assert same.config.adapted_for == other.config.adapted_for == facts
    with torch.no_grad():
        same(random_ids(1, 64), logits_to_keep=1)
        assert not warnings_of(caplog)
        other(random_ids(1, 64), logits_to_keep=1)
    assert len(warnings_of(caplog)) == 1
