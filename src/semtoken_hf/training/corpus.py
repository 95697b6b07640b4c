"""A folder of text files as token blocks for language-model training.

- A document goes to the training or to the held-out side by a hash of its text, so the split survives
  any reordering of files and is the same for every script that reads the folder.
- Token ids are cached per file in `.npy` files written under a temporary name and renamed.
- Blocks are sampled file by file in proportion to `weight x length`; a weight above 1 repeats a file.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tqdm.auto import tqdm

from ..conversion.staging import staged_file

SUFFIXES = (".txt", ".txt.xz", ".md")


def list_text_files(folder: str | os.PathLike) -> list[Path]:
    """Text files directly under `folder`, sorted by name.

    Raises:
        FileNotFoundError: the folder is missing or holds no `.txt`, `.txt.xz` or `.md` file.
    """
    root = Path(folder)
    files = sorted(p for p in root.glob("*") if p.name.endswith(SUFFIXES)) if root.is_dir() else []
    if not files:
        raise FileNotFoundError(f"no text files ({', '.join(SUFFIXES)}) in {root}: point to a folder of plain text")
    return files


def weights_by_file(weights: dict[str, float], files: list[str]) -> dict[str, float]:
    """Weights by the names of files; a name without its suffix stands for the one file that begins with it.

    Raises:
        ValueError: a name stands for no file or for several, or two names stand for the same one.
    """
    found: dict[str, float] = {}
    for name, weight in weights.items():
        meant = [name] if name in files else [file for file in files if file in {name + end for end in SUFFIXES}]
        if len(meant) != 1:
            raise ValueError(
                f"--weights names {name!r}, which stands for {meant or 'no file'}; there are {sorted(files)}"
            )
        if meant[0] in found:
            raise ValueError(f"--weights names {meant[0]!r} twice")
        found[meant[0]] = weight
    return found


def open_text(file: Path) -> Any:
    """A text file, unpacked if its name ends in .xz."""
    return lzma.open(file, "rt", encoding="utf-8") if file.suffix == ".xz" else open(file, encoding="utf-8")


def read_documents(file: Path) -> list[str]:
    """Documents of one file, split at two blank lines where the file uses them, else at one."""
    with open_text(file) as handle:
        text = handle.read()
    separator = r"\n{3,}" if "\n\n\n" in text else r"\n\n"
    return [d.strip("\n") for d in re.split(separator, text) if d.strip()]


def is_held_out(document: str, share: float) -> bool:
    """True for a `share` of all documents, decided by the text alone."""
    digest = hashlib.sha256(document[:4096].encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def read_held_out(file: Path, share: float) -> str:
    """The held-out documents of a file as one text."""
    return "\n\n\n".join(d for d in read_documents(file) if is_held_out(d, share))


def iter_training_text(files: list[Path], held_out_share: float) -> Iterator[str]:
    """Training documents of all files, for building a vocabulary."""
    for file in files:
        yield from (d for d in read_documents(file) if not is_held_out(d, held_out_share))


def tokenize_file(
    file: Path, tokenizer: Tokenizer, cache_dir: Path, held_out_share: float, bos_id: int
) -> dict[str, np.ndarray]:
    """Token ids of one file, every document opened by BOS.

    Returns:
        `{"train": uint32 [N], "held_out": uint32 [K]}`, memory-mapped from `cache_dir`.
    """
    key = hashlib.sha256(f"{tokenizer.to_str()}{held_out_share}{file.stat().st_size}".encode()).hexdigest()[:12]
    paths = {side: cache_dir / f"{file.name}.{key}.{side}.npy" for side in ("train", "held_out")}
    if not all(p.exists() for p in paths.values()):
        cache_dir.mkdir(parents=True, exist_ok=True)
        sides: dict[str, list[np.ndarray]] = {"train": [], "held_out": []}
        documents = read_documents(file)
        for start in tqdm(range(0, len(documents), 64), desc=f"tokenize {file.name}", unit="batch"):
            batch = documents[start : start + 64]
            for document, encoding in zip(batch, tokenizer.encode_batch(batch, add_special_tokens=False), strict=True):
                ids = np.array([bos_id, *encoding.ids], dtype=np.uint32)
                sides["held_out" if is_held_out(document, held_out_share) else "train"].append(ids)
        for side, parts in sides.items():
            with staged_file(paths[side]) as staged, staged.open("wb") as handle:
                np.save(handle, np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint32))
    return {side: np.load(path, mmap_mode="r") for side, path in paths.items()}


class BlockSampler:
    """Blocks of `block_length` tokens in a fixed shuffled order; block `i` depends on the seed alone.

    Args:
        streams: name -> token ids [N].
        block_length: tokens per block.
        weights: name -> how often a file is passed over relative to the others (default 1).
        seed: shuffles the order, and where in its file each pass starts.

    Raises:
        ValueError: a weight names no file, or no file is as long as one block.
    """

    def __init__(self, streams: dict[str, np.ndarray], block_length: int, weights: dict[str, float], seed: int):
        unknown = set(weights) - set(streams)
        if unknown:
            raise ValueError(f"weights name unknown files {sorted(unknown)}; there are {sorted(streams)}")
        self.streams, self.block_length = streams, block_length
        generator = np.random.default_rng(seed)
        entries = []
        for index, (name, ids) in enumerate(streams.items()):
            weight = weights.get(name, 1.0)
            per_pass = len(ids) // block_length
            for first in range(int(np.ceil(weight))):
                share = min(1.0, weight - first)
                offset = int(generator.integers(0, max(1, len(ids) - per_pass * block_length + 1)))
                chosen = generator.permutation(per_pass)[: int(per_pass * share)]
                entries.append(np.stack([np.full(len(chosen), index), offset + chosen * block_length], axis=1))
        self.order = generator.permutation(np.concatenate(entries))
        if not len(self.order):
            raise ValueError(f"no file holds {block_length} tokens: add text or shorten the blocks")
        self.names = list(streams)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> np.ndarray:
        """Block `index` (modulo the number of blocks) as int64 [block_length]."""
        file_index, start = self.order[index % len(self.order)]
        ids = self.streams[self.names[file_index]][start : start + self.block_length]
        return np.asarray(ids, dtype=np.int64)
