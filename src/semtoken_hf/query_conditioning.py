"""Query-conditioned budget (SemToken, section 3.3): spans that are like the question are worth more.

The question is one fingerprint, the mean of its tokens'. A span's similarity to it counts in standard deviations of
its stretch, so that a weight means the same for every encoder, and enters the worth as a factor exp(weight * z).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .span_clustering import Spans, row_products
from .token_layout import TokenLayout


def query_similarity(fingerprints: Tensor, spans: Spans, layout: TokenLayout, query: Tensor) -> Tensor:
    """How like the question of its stretch every span is, standardised over the stretch's merged spans.

    Args:
        fingerprints: float32 [N, D] of unit norm.
        spans: P spans of the stream.
        layout: its stretches.
        query: bool [N], tokens of the question; a stretch without any has similarity 0 throughout.

    Returns:
        float32 [P], of mean 0 and variance 1 over the spans of several tokens of every stretch, 0 for single tokens.
    """
    span_stretch = layout.stretch_at(spans.first)
    spans_of = torch.zeros_like(layout.lengths).index_add_(0, span_stretch, torch.ones_like(span_stretch))

    def total(values: Tensor, lengths: Tensor) -> Tensor:
        # Not `index_add_`, whose order of adding a GPU does not fix.
        return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)

    question = F.normalize(total(fingerprints * query[:, None], layout.lengths), dim=-1)
    cosine = row_products(fingerprints, question, layout.stretch)[:, None]
    # Protected tokens stay whole whatever they are like, and the question itself is the likest.
    counted = spans.lengths > 1
    similarity = spans.mean(cosine).squeeze(-1).where(counted, 0)
    count = total(counted.to(similarity.dtype), spans_of).clamp(min=1)
    centred = similarity - (total(similarity, spans_of) / count)[span_stretch]
    deviation = (total(centred.square() * counted, spans_of) / count).sqrt()
    return (centred / deviation.clamp(min=1e-6)[span_stretch]).where(counted, 0)


__all__ = ["query_similarity"]
