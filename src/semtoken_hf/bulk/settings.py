"""What a data set is compressed with: by the user's choice, and for one worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..conversion.source import DTYPES

PREFIXES, PROMPT_EMBEDS = KINDS = ("prefixes", "prompt-embeds")


@dataclass(frozen=True)
class BulkOptions:
    """What is compressed, and how; a run that goes on has the same.

    Attributes:
        checkpoint: SemToken folder or Hub id.
        source: see `documents.read_documents`.
        kind: "prefixes" for `model.generate`, or "prompt-embeds" for an inference engine.
        text_field: field or column of the text.
        text_config: configuration of a data set on the Hub.
        text_split: its split.
        target_ratio: tokens per slot; None: the checkpoint's.
        dtype: that the model will be loaded in: "float32" or "bfloat16"; None: the checkpoint's.
        shard_size: documents in a file.

    Raises:
        ValueError: a value that cannot be.
    """

    checkpoint: str
    source: str
    kind: str = PREFIXES
    text_field: str = "text"
    text_config: str | None = None
    text_split: str = "train"
    target_ratio: float | None = None
    dtype: str | None = None
    shard_size: int = 64

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is '{self.kind}', and must be one of {list(KINDS)}")
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"dtype is '{self.dtype}', and must be one of {list(DTYPES)}")
        if self.shard_size < 1:
            raise ValueError(f"shard_size is {self.shard_size}, and must be at least 1 document")
        if self.target_ratio is not None and not self.target_ratio >= 1:
            raise ValueError(f"target_ratio is {self.target_ratio}, and must be at least 1 token per slot")


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker needs, wherever it runs.

    Attributes:
        checkpoint: folder or Hub id.
        revision: commit of a Hub id.
        kind, target_ratio, dtype: as in `BulkOptions`.
        folder: of the shards.
        identity: of the model that will read them, as `prefix_semtoken.identity_of` has it.
    """

    checkpoint: str
    revision: str | None
    kind: str
    target_ratio: float | None
    dtype: str | None
    folder: str
    identity: dict[str, Any]


__all__ = ["KINDS", "PREFIXES", "PROMPT_EMBEDS", "BulkOptions", "WorkerSettings"]
