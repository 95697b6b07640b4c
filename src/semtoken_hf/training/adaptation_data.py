"""Batches for adaptation: blocks of real text, cut to a context and a target, with the ratio to read the context at.

All of a batch follows from the index of its first block, so a resumed run sees the batches it would have seen.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..conversion.staging import staged_file
from .corpus import BlockSampler, list_text_files, tokenize_file


@dataclass(frozen=True)
class BatchShape:
    """How batches are drawn; lengths in tokens.

    Attributes:
        context_length: longest context.
        min_context_length: shortest context.
        target_length: tokens that are scored behind the context.
        ratios: lowest and highest tokens per slot, drawn log-uniformly.
        uncompressed_share: of the batches read without compression, in [0, 1).
        batch_size: rows of a batch.
        seed: of the draws.
    """

    context_length: int
    min_context_length: int
    target_length: int
    ratios: tuple[float, float]
    uncompressed_share: float
    batch_size: int
    seed: int


@dataclass(frozen=True)
class PackedShape:
    """How packed batches are drawn; lengths in tokens.

    Attributes:
        sequence_length: of a row, a multiple of `chunk_length`.
        chunk_length: of a chunk.
        span_lengths: tokens of a span, drawn for each chunk.
        uncompressed_share: of the batches read without compression, in [0, 1).
        batch_size: rows of a batch.
        seed: of the draws.
    """

    sequence_length: int
    chunk_length: int
    span_lengths: tuple[int, ...]
    uncompressed_share: float
    batch_size: int
    seed: int

    @property
    def targets(self) -> int:
        """Scored tokens of a row: all but the first chunk."""
        return self.sequence_length - self.chunk_length


class TextBlocks(Dataset):
    """Blocks `{"input_ids": int64 [n], "index": i}` in the sampler's shuffled order, each opened by BOS."""

    def __init__(self, sampler: BlockSampler, bos_id: int, limit: int):
        self.sampler, self.bos_id, self.limit = sampler, bos_id, limit

    def __len__(self) -> int:
        return self.limit

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.from_numpy(self.sampler[index].copy())
        ids[0] = self.bos_id
        return {"input_ids": ids, "index": index}


class ContextCollator:
    """Blocks -> `input_ids` int64 [B, C + T], `target_length`, `target_ratio`, `compression`."""

    def __init__(self, shape: BatchShape):
        self.shape = shape

    def __call__(self, blocks: list[dict[str, Any]]) -> dict[str, Any]:
        shape, index = self.shape, blocks[0]["index"]
        generator = np.random.default_rng((shape.seed, index))
        context = int(generator.integers(shape.min_context_length, shape.context_length + 1))
        low, high = (math.log(r) for r in shape.ratios)
        ratio = math.exp(generator.uniform(low, high))
        ids = torch.stack([block["input_ids"] for block in blocks])
        return {
            "input_ids": ids[:, : context + shape.target_length],
            "target_length": shape.target_length,
            "target_ratio": ratio,
            "compression": not is_of_share(index // shape.batch_size, shape.uncompressed_share),
        }


class PackedCollator:
    """Blocks -> `input_ids` int64 [B, n], `span_lengths` int64 [B, C - 1], `compression`."""

    def __init__(self, shape: PackedShape):
        self.shape = shape

    def __call__(self, blocks: list[dict[str, Any]]) -> dict[str, Any]:
        shape = self.shape
        earlier = shape.sequence_length // shape.chunk_length - 1
        drawn = [
            np.random.default_rng((shape.seed, block["index"])).choice(shape.span_lengths, earlier) for block in blocks
        ]
        return {
            "input_ids": torch.stack([block["input_ids"] for block in blocks]),
            "span_lengths": torch.from_numpy(np.stack(drawn)).long(),
            "compression": not is_of_share(blocks[0]["index"] // shape.batch_size, shape.uncompressed_share),
        }


def is_of_share(index: int, share: float) -> bool:
    """Whether number `index` is one of an evenly spread `share` of them."""
    return math.floor((index + 1) * share) > math.floor(index * share)


# The file of an exported data set.
EXPORTED = "documents.txt"


def export_dataset(name: str, config: str | None, split: str, column: str, folder: Path, limit: int) -> Path:
    """Write up to `limit` documents of a `datasets` data set to `folder` as a text file; returns the folder.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: the data set has no column of that name.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f"'{name}' is no folder; to load it as a data set install `datasets`") from error
    data = load_dataset(name, config, split=split, streaming=True)
    key = hashlib.sha256(f"{name}{config}{split}{column}{limit}".encode()).hexdigest()[:12]
    target = folder / key / EXPORTED
    if target.exists():
        return target.parent
    with staged_file(target) as staged, staged.open("w", encoding="utf-8") as handle:
        for document in data.take(limit):
            if column not in document:
                raise ValueError(f"'{name}' has the columns {sorted(document)}, not '{column}': pass --text-column")
            # Three newlines part documents in `corpus.read_documents`.
            handle.write(re.sub(r"\n{3,}", "\n\n", document[column].strip("\n")) + "\n\n\n")
    return target.parent


def load_blocks(
    folder: Path,
    tokenizer: Any,
    cache: Path,
    length: int,
    weights: dict[str, float],
    held_out_share: float,
    seed: int,
    window_length: int | None = None,
) -> tuple[BlockSampler, Tensor]:
    """Training blocks of `length` tokens, and held-out windows int64 [W, window_length] (None: as long) opened by BOS,
    spread over the files.

    Raises:
        FileNotFoundError: no text in the folder.
        ValueError: no file is long enough for one block.
    """
    files = list_text_files(folder)
    bos_id = begin_id(tokenizer)
    sides = {f.name: tokenize_file(f, tokenizer.backend_tokenizer, cache, held_out_share, bos_id) for f in files}
    sampler = BlockSampler({name: side["train"] for name, side in sides.items()}, length, weights, seed)
    window = length if window_length is None else window_length
    held_out = [side["held_out"] for side in sides.values() if len(side["held_out"]) >= window]
    if not held_out:
        raise ValueError(
            f"the held-out documents of no file have {window} tokens together: raise --held-out-share, lower "
            "--context-length, or add text"
        )
    blocks = BlockSampler({str(i): ids for i, ids in enumerate(held_out)}, window, {}, seed)
    rows = torch.from_numpy(np.stack([blocks[i] for i in range(len(blocks))]))
    rows[:, 0] = bos_id
    return sampler, rows


def begin_id(tokenizer: Any) -> int:
    """BOS, or what stands in for it."""
    for value in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if value is not None:
            return value
    raise ValueError("the tokenizer has neither a BOS nor an EOS token to open a document with")
