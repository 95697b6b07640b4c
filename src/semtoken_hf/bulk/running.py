"""A data set becomes a folder of shards: what is missing is compressed, by one run at a time."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from ..conversion.source import check_semtoken, resolve_folder
from ..conversion.staging import remove_stale, scratch_folder
from ..evaluation.configuration import checkpoint_stamp
from ..evaluation.files import only_run_in
from ..prefix_semtoken import identity_of
from ..serving.prompt_embeds import check_config
from .engines import ENGINES
from .manifest import (
    MANIFEST,
    check_same,
    make_manifest,
    missing_shards,
    read_manifest,
    split_documents,
    write_manifest,
)
from .settings import PROMPT_EMBEDS, BulkOptions, WorkerSettings
from .shards import read_header


def compress_dataset(
    options: BulkOptions, output: str | Path, engine: str = "datasets", workers: int = 1, progress: bool = True
) -> dict[str, Any]:
    """Compress the documents of a source into shards of `output`; a folder that was begun is gone on with.

    Args:
        output: folder of the shards and their manifest. For Ray on several machines all of them reach it, and the
            checkpoint, under the same path.
        engine: "datasets" or "ray".
        workers: processes; each loads embeddings, encoder and merger.

    Returns:
        `folder`, `kind`, `shards`, `documents`, `tokens`, `slots`, and `written`: the shards of this run.

    Raises:
        FileNotFoundError: no such checkpoint or source.
        ImportError: what the engine needs is not installed.
        ValueError: the checkpoint is not SemToken's, a document cannot be compressed, the folder was begun otherwise,
            or another run is writing it.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine is '{engine}', and must be one of {list(ENGINES)}")
    if workers < 1:
        raise ValueError(f"workers is {workers}, and must be at least 1")
    if find_spec("datasets") is None:
        raise ImportError("compressing data sets needs the extra: pip install 'semtoken-hf[bulk]'")
    folder = Path(output).absolute()
    checkpoint = resolve_folder(options.checkpoint)
    config = AutoConfig.from_pretrained(checkpoint)
    check_semtoken(config, options.checkpoint)
    if options.kind == PROMPT_EMBEDS:
        check_config(config)
    with only_run_in(folder, "compression of documents"):
        manifest = begin(options, folder, checkpoint)
        missing = missing_shards(folder, manifest)
        remove_stale(folder / "rows")
        if missing:
            with scratch_folder(folder / "rows") as scratch:
                rows = write_rows(options, manifest, set(missing), scratch / "rows.arrow")
                settings = worker_settings(options, folder, checkpoint, manifest["identity"])
                ENGINES[engine](rows, settings, workers, progress)
        return {**describe(folder, manifest), "written": len(missing)}


def begin(options: BulkOptions, folder: Path, checkpoint: Path) -> dict[str, Any]:
    """The manifest of the folder, which is written if there is none.

    Raises:
        ValueError: the folder was begun otherwise.
    """
    digest = hashlib.sha256(checkpoint_stamp(str(checkpoint)).encode()).hexdigest()[:16]
    asked = make_manifest(options, digest)
    if (folder / MANIFEST).exists():
        begun = read_manifest(folder)
        check_same(folder, begun, asked)
        return begun
    # Of the whole model, which the workers do not load.
    asked["identity"] = identity_of(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=options.dtype or "auto"))
    write_manifest(folder, asked)
    return asked


def worker_settings(options: BulkOptions, folder: Path, checkpoint: Path, identity: dict[str, Any]) -> WorkerSettings:
    """For workers of any machine: a local checkpoint by its path, one of the Hub by its commit."""
    is_local = Path(options.checkpoint).is_dir()
    name, revision = (str(checkpoint), None) if is_local else (options.checkpoint, checkpoint.name)
    chosen: dict[str, Any] = {"kind": options.kind, "target_ratio": options.target_ratio, "dtype": options.dtype}
    return WorkerSettings(name, revision, folder=str(folder), identity=identity, **chosen)


def write_rows(options: BulkOptions, manifest: dict[str, Any], missing: set[int], path: Path) -> Path:
    """The shards that are missing, a row each, in an Arrow file: `shard`, `file`, `ids`, `texts`."""
    import pyarrow as pa

    texts = pa.list_(pa.large_string())
    schema = pa.schema([("shard", pa.int64()), ("file", pa.string()), ("ids", texts), ("texts", texts)])
    with path.open("wb") as handle, pa.ipc.new_stream(handle, schema) as writer:
        for number, (names, documents) in enumerate(split_documents(options)):
            if number in missing:
                file = manifest["shards"][number]["file"]
                row = {"shard": number, "file": file, "ids": names, "texts": documents}
                writer.write_batch(pa.RecordBatch.from_pylist([row], schema))
    return path


def describe(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """What a finished folder holds."""
    documents = [d for shard in manifest["shards"] for d in read_header(folder / shard["file"])["documents"]]
    return {
        "folder": str(folder),
        "kind": manifest["options"]["kind"],
        "shards": len(manifest["shards"]),
        "documents": len(documents),
        "tokens": sum(document["tokens"] for document in documents),
        "slots": sum(document["slots"] for document in documents),
    }


__all__ = ["compress_dataset"]
