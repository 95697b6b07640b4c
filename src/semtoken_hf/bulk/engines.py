"""Who maps `compress_rows` over the shards: `datasets` on one machine, Ray Data on many.

Rows lie in an Arrow file, a shard each; a batch is one row, so that a shard is written as soon as it is compressed.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..evaluation.jobs import run_jobs
from .settings import WorkerSettings
from .shards import compress_rows


def run_with_datasets(rows: Path, settings: WorkerSettings, workers: int, progress: bool) -> None:
    """`datasets.map` in `workers` processes of this machine, which share the threads of this one.

    The processes are ours: those of `map(num_proc=...)` are forked, which may hang behind threads of PyTorch, and would
    outlive a run that is killed, with the lock of its folder.
    """
    from datasets import Dataset

    count = len(Dataset.from_file(str(rows)))
    run = functools.partial(map_row, rows=str(rows), settings=settings)
    run_jobs(run, list(range(count)), min(workers, count), unit="shard", progress=progress)


def map_row(number: int, rows: str, settings: WorkerSettings) -> None:
    """Map `compress_rows` over one row of the file `rows`."""
    from datasets import Dataset

    data = Dataset.from_file(rows).select([number])
    options: dict[str, Any] = {"batched": True, "batch_size": 1, "remove_columns": data.column_names}
    # Nobody looks for the result again: it needs no file, and no name made of the function's code.
    options |= {"keep_in_memory": True, "load_from_cache_file": False, "new_fingerprint": f"shard-{number}"}
    with _without_bars():
        data.map(compress_rows, fn_kwargs={"settings": settings}, **options)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """No bar of `datasets` for every shard."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def run_with_ray(rows: Path, settings: WorkerSettings, workers: int, progress: bool) -> None:
    """Ray Data with `workers` tasks at once, in the cluster that RAY_ADDRESS names, or else one that is started here.

    Raises:
        ImportError: Ray is not installed.
        RuntimeError: Ray's own failure.
        ValueError: shards failed; the others are written.
    """
    try:
        import ray
        import ray.data
        from ray.exceptions import RayError
    except ImportError as error:
        raise ImportError(f"the engine ray needs the extra: pip install 'semtoken-hf[ray]' ({error})") from error
    from datasets import Dataset

    ray.data.DataContext.get_current().enable_progress_bars = progress
    with _cluster(ray, workers):
        gpus = int(ray.cluster_resources().get("GPU", 0))
        share = 1 / math.ceil(workers / gpus) if gpus else None
        # A block a shard: Ray gives each to the next free worker.
        batches = Dataset.from_file(str(rows)).data.table.to_batches()
        data = ray.data.from_arrow([table_of(batch) for batch in batches])
        options: dict[str, Any] = {"batch_size": 1, "batch_format": "numpy", "num_gpus": share}
        options |= {"fn_kwargs": {"settings": settings}, "compute": ray.data.TaskPoolStrategy(size=workers)}
        try:
            errors = [row["error"] for row in data.map_batches(compress_and_report, **options).iter_rows()]
        except RayError as error:
            raise RuntimeError(f"Ray could not go on: {error}") from error
    if failed := list(filter(None, errors)):
        raise ValueError(failed[0] + (f" ({len(failed)} shards failed)" if len(failed) > 1 else ""))


def compress_and_report(rows: dict[str, Any], settings: WorkerSettings) -> dict[str, Any]:
    """`compress_rows`, and what it raised, since Ray would hand on a traceback as text; other shards go on."""
    error = ""
    try:
        compress_rows(rows, settings)
    except (ValueError, RuntimeError, OSError) as caught:
        error = str(caught)
    return {"error": [error]}


def table_of(batch: Any) -> Any:
    import pyarrow

    return pyarrow.Table.from_batches([batch])


@contextlib.contextmanager
def _cluster(ray: Any, workers: int) -> Iterator[None]:
    """The cluster that this process is in, or RAY_ADDRESS names, or one of this machine until the end of the block."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    local: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers, "include_dashboard": False}
    ray.init(log_to_driver=False, **local)
    try:
        yield
    finally:
        ray.shutdown()


ENGINES = {"datasets": run_with_datasets, "ray": run_with_ray}

__all__ = ["ENGINES", "run_with_datasets", "run_with_ray"]
