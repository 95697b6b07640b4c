"""Rows of a data set, from a local file or from the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...training.corpus import open_text


def read_rows(source: str, name: str | None = None, split: str = "test") -> list[dict[str, Any]]:
    """Rows of a `.jsonl`, `.jsonl.xz` or `.json` file, or else of a data set on the Hub.

    Args:
        source: a file, or what `datasets.load_dataset` takes.
        name: the data set's configuration on the Hub.
        split: its split.

    Raises:
        FileNotFoundError: `source` looks like a file and there is none.
        ValueError: a line of the file is not JSON.
    """
    path = Path(source)
    if path.is_file():
        with open_text(path) as handle:
            try:
                if ".jsonl" in path.name:
                    return [json.loads(line) for line in handle if line.strip()]
                return list(json.load(handle))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} holds a line that is not JSON: {error}") from error
    if path.suffix in (".json", ".jsonl", ".xz", ".txt"):
        raise FileNotFoundError(f"there is no file {path}: correct the source, or give the id of a data set on the Hub")
    from datasets import load_dataset

    return list(load_dataset(source, name, split=split))


def read_text(source: str, name: str | None = None, split: str = "test", column: str = "text") -> str:
    """A whole text file, or a column of a data set on the Hub."""
    path = Path(source)
    if path.is_file():
        with open_text(path) as handle:
            return handle.read()
    return "".join(row[column] for row in read_rows(source, name, split))


def spread(items: list[Any], fraction: float) -> list[Any]:
    """A `fraction` of the items, at least one, evenly spaced: every kind in a sorted list keeps its share."""
    count = max(1, round(len(items) * fraction)) if items else 0
    return [items[i * len(items) // count] for i in range(count)]


def first_of(row: dict[str, Any], names: Iterable[str]) -> Any:
    """The value of the first column that the row has; data sets name the same thing differently.

    Raises:
        KeyError: it has none of them.
    """
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise KeyError(f"a row has none of the columns {list(names)}, but {sorted(row)}: is this the right data set?")
