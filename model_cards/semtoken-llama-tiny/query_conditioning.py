"""Query-conditioned budget (SemToken, section 3.3): spans that are like the question are worth more.

The question is one fingerprint, the mean of its tokens'. A span's similarity to it counts in standard deviations of
its stretch, so that a weight means the same for every encoder, and enters the worth as a factor exp(weight * z).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .span_clustering import Spans
from .token_layout import TokenLayout


def query_similarity(fingerprints: Tensor, spans: Spans, layout: TokenLayout, query: Tensor) -> Tensor:
    """How like the question of its stretch every span is, standardised over the stretch's merged spans.

    Args:
        fingerprints: float32 [N, D] of unit norm.
        spans: P spans of the stream.
        layout: its stretches.
        query: bool [N], tokens of the question; a stretch without any has similarity 0 throughout.

    Returns:
        float32 [P], of mean 0 and variance 1 over the spans of several tokens of every stretch.
    """
    stretches, span_stretch = len(layout.lengths), layout.stretch[spans.first]

    def total(values: Tensor, index: Tensor) -> Tensor:
        return values.new_zeros((stretches, *values.shape[1:])).index_add_(0, index, values)

    question = F.normalize(total(fingerprints * query[:, None], layout.stretch), dim=-1)
    cosine = (fingerprints * question[layout.stretch]).sum(-1, keepdim=True)
    similarity = spans.mean(cosine).squeeze(-1)
    # Protected tokens stay whole whatever they are like, and the question itself is the likest.
    counted = (spans.lengths > 1).to(similarity.dtype)
    count = total(counted, span_stretch).clamp(min=1)
    centred = similarity - (total(similarity * counted, span_stretch) / count)[span_stretch]
    deviation = (total(centred.square() * counted, span_stretch) / count).sqrt()
    return centred / deviation.clamp(min=1e-6)[span_stretch]


__all__ = ["query_similarity"]
