"""Slots from spans, against loops over the spans."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from semtoken_hf.span_clustering import Spans
from semtoken_hf.span_merging import merge_spans

LENGTHS = torch.tensor([1, 4, 2, 1, 1, 7, 3, 1, 2])
FIRST = LENGTHS.cumsum(0) - LENGTHS
LAST = FIRST + LENGTHS - 1
TOKENS = int(LENGTHS.sum())
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def spans() -> Spans:
    starts = torch.zeros(TOKENS, dtype=torch.bool)
    starts[FIRST] = True
    return Spans.from_starts(starts)


def embeddings(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(TOKENS, 5).to(dtype).requires_grad_()


def fingerprints() -> Tensor:
    return F.normalize(torch.randn(TOKENS, 6), dim=1)


def nearest_tokens(h: Tensor) -> Tensor:
    """The token of each span whose fingerprint is nearest the mean of the span."""
    parts = [h[a : a + n] for a, n in zip(FIRST, LENGTHS, strict=True)]
    return FIRST + torch.stack([(part @ part.mean(0)).argmax() for part in parts])


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean(dtype: torch.dtype) -> None:
    values = embeddings(dtype)
    slots, anchors = merge_spans(values.__getitem__, spans(), "mean", fingerprints())
    rows = [values[a : a + n].detach().double().mean(0) for a, n in zip(FIRST, LENGTHS, strict=True)]
    assert slots.dtype == dtype
    assert torch.allclose(slots, torch.stack(rows).to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)
    assert torch.equal(anchors, LAST)
    assert torch.equal(slots[LENGTHS == 1], values[FIRST[LENGTHS == 1]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_representative(dtype: torch.dtype) -> None:
    values, h = embeddings(dtype), fingerprints()
    slots, anchors = merge_spans(values.__getitem__, spans(), "representative", h)
    # Two unit vectors are equally near their mean.
    is_decided = LENGTHS != 2
    assert torch.equal(anchors[is_decided], nearest_tokens(h)[is_decided])
    assert not torch.equal(anchors[is_decided], LAST[is_decided])
    assert slots.dtype == dtype
    assert torch.equal(slots, values[anchors])


def test_equally_near_tokens_give_the_later_one() -> None:
    _, anchors = merge_spans(embeddings().__getitem__, spans(), "representative", torch.ones(TOKENS, 4) / 2)
    assert torch.equal(anchors, LAST)


def test_of_two_tokens_the_later_one_represents() -> None:
    """Both are equally near their mean, so rounding, which differs between devices, must not decide."""
    pairs = Spans.from_starts(torch.arange(200) % 2 == 0)
    h = F.normalize(torch.randn(200, 64), dim=1)
    _, anchors = merge_spans(torch.randn(200, 5).__getitem__, pairs, "representative", h)
    assert torch.equal(anchors, torch.arange(1, 200, 2))


def test_without_fingerprints_the_last_token_represents() -> None:
    values = embeddings()
    slots, anchors = merge_spans(values.__getitem__, spans(), "representative", None)
    assert torch.equal(anchors, LAST)
    assert torch.equal(slots, values[LAST])


def test_the_gradient_of_a_mean_is_shared_by_its_tokens() -> None:
    values = embeddings()
    slots, _ = merge_spans(values.__getitem__, spans(), "mean")
    weight = torch.randn_like(slots)
    (slots * weight).sum().backward()
    assert torch.allclose(values.grad, (weight / LENGTHS[:, None]).repeat_interleave(LENGTHS, dim=0))


def test_the_gradient_of_a_representative_goes_to_that_token_alone() -> None:
    values, h = embeddings(), fingerprints()
    slots, anchors = merge_spans(values.__getitem__, spans(), "representative", h)
    weight = torch.randn_like(slots)
    (slots * weight).sum().backward()
    expected = torch.zeros_like(values)
    expected[anchors] = weight
    assert torch.equal(values.grad, expected)


@pytest.mark.parametrize("mode", ["mean", "representative"])
def test_spans_of_one_token_change_no_bit(mode: str) -> None:
    values = embeddings(torch.bfloat16)
    alone = Spans.from_starts(torch.ones(TOKENS, dtype=torch.bool))
    slots, anchors = merge_spans(values.__getitem__, alone, mode, fingerprints())
    assert torch.equal(slots, values)
    assert torch.equal(anchors, torch.arange(TOKENS))


@pytest.mark.parametrize("mode", ["mean", "representative"])
def test_no_tokens(mode: str) -> None:
    nothing = Spans.from_starts(torch.zeros(0, dtype=torch.bool))
    slots, anchors = merge_spans(torch.zeros(0, 5).__getitem__, nothing, mode, torch.zeros(0, 6))
    assert slots.shape == (0, 5)
    assert anchors.shape == (0,)
