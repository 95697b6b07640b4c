"""The manifest of a folder of shards: what they are made of, written before the first, compared by every later run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from ..evaluation.files import write_text
from .documents import read_documents
from .settings import BulkOptions

MANIFEST, FORMAT, VERSION = "manifest.json", "semtoken_documents", 1
# Where the checkpoint and the source lie may change; what they hold may not.
MOVABLE = ("checkpoint", "source")


def split_documents(options: BulkOptions) -> Iterator[tuple[list[str], list[str]]]:
    """Ids and texts of every shard."""
    documents = read_documents(options)
    while pairs := list(islice(documents, options.shard_size)):
        yield [name for name, _ in pairs], [text for _, text in pairs]


def list_shards(options: BulkOptions) -> list[dict[str, Any]]:
    """File, document ids and a digest of ids and texts, of every shard."""
    return [
        {"file": f"shard-{number:05}.safetensors", "documents": ids, "digest": digest_of(ids, texts)}
        for number, (ids, texts) in enumerate(split_documents(options))
    ]


def digest_of(ids: list[str], texts: list[str]) -> str:
    return hashlib.sha256(json.dumps([ids, texts]).encode()).hexdigest()[:16]


def make_manifest(options: BulkOptions, checkpoint_digest: str) -> dict[str, Any]:
    """The manifest of a new folder, but for the identity of the model."""
    chosen = asdict(options)
    return {
        "format": FORMAT,
        "version": VERSION,
        "checkpoint": options.checkpoint,
        "checkpoint_digest": checkpoint_digest,
        "source": options.source,
        "options": {name: value for name, value in chosen.items() if name not in MOVABLE},
        "shards": list_shards(options),
    }


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write it whole or not at all.

    Raises:
        ValueError: the folder holds shards of something else.
    """
    if foreign := sorted(path.name for path in folder.glob("shard-*")):
        raise ValueError(f"{folder} holds {foreign[0]} and no {MANIFEST}: choose another folder")
    write_text(folder / MANIFEST, json.dumps(manifest, ensure_ascii=False, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder that `semtoken compress-dataset` has begun.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {MANIFEST}: `semtoken compress-dataset` makes such folders")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"{path} is no manifest of {FORMAT} version {VERSION}: compress the documents again")
    return manifest


def check_same(folder: Path, begun: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise ValueError at the first thing in which a run differs from the one that began the folder."""
    for name, value in asked["options"].items():
        before = begun["options"].get(name)
        if value != before:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{folder} was begun with {option} {before}, and now it is {value}: pass the same, or choose another "
                "folder"
            )
    if begun["checkpoint_digest"] != asked["checkpoint_digest"]:
        raise ValueError(
            f"{folder} was begun with another checkpoint, {begun['checkpoint']}, than {asked['checkpoint']} is now: "
            "pass that one, or choose another folder"
        )
    if begun["shards"] != asked["shards"]:
        pairs = zip(begun["shards"], asked["shards"], strict=False)
        first = next((old for old, new in pairs if old != new), None)
        where = f"from '{first['documents'][0]}' on" if first else "at the end"
        raise ValueError(
            f"{folder} was begun with other documents than {asked['source']} holds now; they differ {where}: restore "
            "them, or choose another folder"
        )


def missing_shards(folder: Path, manifest: dict[str, Any]) -> list[int]:
    """Numbers of the shards that are not written."""
    return [n for n, shard in enumerate(manifest["shards"]) if not (folder / shard["file"]).is_file()]


__all__ = ["check_same", "make_manifest", "missing_shards", "read_manifest", "split_documents", "write_manifest"]
