"""What an ablation takes away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .. import granularity


@contextmanager
def chance_instead_of_entropy(seed: int, active: bool = True) -> Iterator[None]:
    """Within this block, random spans stay fine instead of those of highest entropy, if `active`."""
    if not active:
        yield
        return
    entropy, generator = granularity.span_entropy, torch.Generator().manual_seed(seed)
    granularity.span_entropy = lambda fingerprints, spans: torch.rand(len(spans), generator=generator)
    try:
        yield
    finally:
        granularity.span_entropy = entropy
