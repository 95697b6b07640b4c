"""The host waits for the device once in the whole stage, to learn how many slots there are.

A first run notes what `tolist` returned; the second runs on fake tensors, which have shapes and no values, and is told
those numbers: whatever else would have to look at a value fails. Both run as on a device: `is_on_host` says no.
"""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

from semtoken_hf import CompressedPrompt, span_merging
from tests.fixtures.tiny import BERT, ragged_prompts, random_ids, tiny_model

THRESHOLD = {"segmentation_mode": "greedy", "target_ratio": None, "similarity_threshold": 0.5}
CASES = {
    "solved": {"segmentation_mode": "greedy"},
    "capped tau": {"segmentation_mode": "greedy", "similarity_threshold": 0.5},
    "boundary": {"segmentation_mode": "boundary", "merge_mode": "representative"},
    "uniform": {"segmentation_mode": "uniform"},
    "sentence": {"segmentation_mode": "sentence", "text_markers": {"sentence_ends": [7, 8, 9]}},
    "chat": {"segmentation_mode": "sentence", "text_markers": {"turn_opening": [7], "turn_ending": [8]}},
    "learned": {"segmentation_mode": "sentence", "merge_mode": "learned"},
    "transformer": {"encoder_config": BERT, "encoder_window": 32, "encoder_overlap": 4},
    "compact": {"position_mode": "compact"},
}


@pytest.fixture(autouse=True)
def on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(span_merging, "is_on_host", lambda tensor: False)


def compress_waiting(model: Any, waits: int, ids: Tensor, mask: Tensor | None, **call: Any) -> None:
    """Compress twice, as told at the head of this file, and compare the shapes."""
    lists: list[Any] = []
    tolist = Tensor.tolist

    def note(tensor: Tensor) -> Any:
        lists.append(tolist(tensor))
        return lists[-1]

    with torch.no_grad(), patch.object(Tensor, "tolist", note):
        real = model.compress(ids, mask, **call)
    assert len(lists) == waits
    answers = iter(lists)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = {name: mode.from_tensor(v) if isinstance(v, Tensor) else v for name, v in call.items()}
        fake_mask = None if mask is None else mode.from_tensor(mask)
        with patch.object(FakeTensor, "tolist", lambda _: next(answers)):
            fake = model.compress(mode.from_tensor(ids), fake_mask, **given)
    assert real.is_merged
    for name in (field.name for field in dataclasses.fields(CompressedPrompt) if field.name != "origin"):
        ours, theirs = getattr(real, name), getattr(fake, name)
        assert ours.shape == theirs.shape if isinstance(ours, Tensor) else ours == theirs, name


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_one_wait(case: str, padded: bool) -> None:
    model = tiny_model(**CASES[case])
    ids, mask = ragged_prompts((96, 70, 41)) if padded else (random_ids(2, 96), None)
    compress_waiting(model, 1, ids, mask)


def test_one_wait_with_everything_given() -> None:
    model, (ids, mask) = tiny_model(merge_mode="representative"), ragged_prompts((96, 70, 41))
    some = torch.zeros_like(ids)
    some[:, -30:-20] = 1
    read = torch.zeros_like(ids, dtype=torch.bool)
    read[:, -5:] = True
    call = {"protected_mask": some, "query_mask": some.roll(-9, 1), "read_mask": read, "target_ratio": 3.0}
    compress_waiting(model, 1, ids, mask, **call)
    compress_waiting(model, 1, ids, mask, span_ids=model.compress(ids, mask).span_ids)


def test_thresholds_alone_wait_for_the_fingerprints() -> None:
    """Without a budget nobody knows the slots beforehand, so that the rows are told in a transfer of their own."""
    model, ids = tiny_model(**THRESHOLD), random_ids(2, 96)
    tolist, lists = Tensor.tolist, []
    with patch.object(Tensor, "tolist", lambda tensor: lists.append(tolist(tensor)) or lists[-1]):
        prompt = model.compress(ids)
    assert prompt.is_merged
    assert lists[1:] == [prompt.slot_counts] == [prompt.kept_lengths.tolist()]


def test_a_wait_is_noticed() -> None:
    model = tiny_model()
    encoder = model.base_model.semantic_encoder
    normal = encoder.forward

    def waits(*args: Any, **kwargs: Any) -> Tensor:
        states = normal(*args, **kwargs)
        return states * bool(states.any())

    with patch.object(encoder, "forward", waits), pytest.raises(DataDependentOutputException):
        compress_waiting(model, 1, random_ids(1, 96), None)


def test_fake_tensors_leave_nothing_behind() -> None:
    """Whatever the stage might keep between calls, a run without values must not spoil it."""
    model, ids = tiny_model(protected_token_ids=[7, 8, 9]), random_ids(1, 96)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(DataDependentOutputException):
        model.compress(mode.from_tensor(ids))
    assert model.compress(ids).is_merged
