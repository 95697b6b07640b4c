"""The documents of a folder, a JSON Lines file or a data set, one after the other."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..training.corpus import open_text
from .settings import BulkOptions

TEXTS, LINES = (".txt", ".md"), (".jsonl", ".jsonl.xz")
# By which `datasets` knows what `save_to_disk` has written.
SAVED = ("state.json", "dataset_dict.json")


def read_documents(options: BulkOptions) -> Iterator[tuple[str, str]]:
    """Id and text of every document, in an order that stays.

    The source is a folder of .txt and .md files, at any depth, whose paths are the ids; a .jsonl or .jsonl.xz file; a
    folder that `save_to_disk` of `datasets` has written; or the id of a data set on the Hub. Rows have their `id`, or
    their number where they have none.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: no document at all, an id twice, an empty text, a row without the text field, or a broken file.
    """
    seen: set[str] = set()
    for name, text in _read(options):
        if name in seen:
            raise ValueError(f"two documents of {options.source} have the id '{name}': ids must differ")
        if not text:
            raise ValueError(f"document '{name}' of {options.source} is empty: take it out")
        seen.add(name)
        yield name, text
    if not seen:
        raise ValueError(f"{options.source} holds no documents: see `semtoken compress-dataset --help`")


def _read(options: BulkOptions) -> Iterable[tuple[str, str]]:
    path = Path(options.source)
    if path.is_dir() and not any((path / name).is_file() for name in SAVED):
        return _read_folder(path)
    if path.name.endswith((*LINES, *TEXTS)) or path.is_file():
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        if not path.name.endswith(LINES):
            raise ValueError(f"{path} is no {' or '.join(LINES)} file: put texts into a folder, and name the folder")
        return _read_rows(_read_lines(path), options)
    return _read_rows(_load_rows(path, options), options)


def _read_folder(folder: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(path for path in folder.rglob("*") if path.suffix in TEXTS and path.is_file()):
        try:
            yield file.relative_to(folder).as_posix(), file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 ({error}): convert it, or take it out") from error


def _read_lines(file: Path) -> Iterator[Any]:
    with open_text(file) as handle:
        for number, line in enumerate(handle, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"line {number} of {file} is not JSON: {error}") from error


def _load_rows(path: Path, options: BulkOptions) -> Iterable[Any]:
    from datasets import DatasetDict, load_dataset, load_from_disk

    if not path.is_dir():
        return load_dataset(options.source, options.text_config, split=options.text_split)
    data = load_from_disk(str(path))
    if not isinstance(data, DatasetDict):
        return data
    if options.text_split not in data:
        raise ValueError(f"{path} has the splits {sorted(data)}, not '{options.text_split}': pass --text-split")
    return data[options.text_split]


def _read_rows(rows: Iterable[Any], options: BulkOptions) -> Iterator[tuple[str, str]]:
    field = options.text_field
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            has = f"the fields {sorted(row)}" if isinstance(row, dict) else "no fields"
            raise ValueError(f"row {number} of {options.source} has {has}, and no text in '{field}': pass --text-field")
        name = row.get("id")
        yield str(number if name is None else name), row[field]


__all__ = ["read_documents"]
