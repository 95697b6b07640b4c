"""What decides which sentences stay whole, taken apart: exact matches alone, fingerprints alone, or chance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .. import granularity, sentence_selection
from ..token_layout import TokenLayout

RELEVANCES = ("words", "fingerprints", "chance")


@contextmanager
def relevance_from(part: str | None, seed: int = 0) -> Iterator[None]:
    """Within this block, one of `RELEVANCES` decides instead of both parts together; None: both."""
    before = granularity.sentence_relevance

    def relevance(
        input_ids: Tensor, fingerprints: Tensor, sentence: Tensor, layout: TokenLayout, query: Tensor
    ) -> Tensor:
        if part == "chance":
            drawn = torch.randn(len(sentence), generator=torch.Generator().manual_seed(seed)).to(fingerprints)
            return drawn[sentence]
        counted = sentence_selection.first_tokens(sentence) & ~query
        if part == "words":
            values = sentence_selection.word_match(input_ids, sentence, layout, query, counted)
        else:
            values = sentence_selection.likeness(fingerprints, sentence, layout, query)
        parts = sentence_selection.standardised(values, counted, layout).float()
        return sentence_selection.carried_over_cuts(parts, sentence, layout)

    if part is not None:
        granularity.sentence_relevance = relevance
    try:
        yield
    finally:
        granularity.sentence_relevance = before


__all__ = ["RELEVANCES", "relevance_from"]
