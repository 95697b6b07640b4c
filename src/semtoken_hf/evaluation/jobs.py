"""Work in pieces that a killed run keeps: a file of results for every cell, whole or on its way.

Of the package it imports nothing: the environment of the kvpress baselines, which cannot install it, loads it too.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm.auto import tqdm

T = TypeVar("T")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a results file; none if there is no file."""
    if not path.exists():
        return []
    records = []
    # Of bytes: a killed run may have left half a character. And not `splitlines`, which also cuts at the line
    # separators that an answer may hold.
    for line in path.read_bytes().split(b"\n"):
        try:
            records.append(json.loads(line.decode("utf-8")))
        except ValueError:
            break
    return records


def complete_records(path: Path, items: dict[str, T], read: Callable[[T], dict[str, Any]], title: str) -> None:
    """Write a line for every item, as `.partial` until all are there; lines of a killed run are not read again.

    Args:
        path: of the results; if it exists, nothing is done.
        items: by id; the line that `read` makes of one has it under "id".
        title: of the progress bar.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    records = read_records(partial)
    done = {record["id"] for record in records}
    # Rewritten beside it, so that half a last line of a killed run is gone, and a second kill loses nothing.
    rewritten = path.with_suffix(".rewritten")
    rewritten.write_text("".join(map(as_line, records)), encoding="utf-8")
    os.replace(rewritten, partial)
    with partial.open("a", encoding="utf-8") as handle:
        for name, item in tqdm(items.items(), desc=title, leave=False, disable=None, mininterval=1):
            if name not in done:
                handle.write(as_line(read(item)))
                handle.flush()
    os.replace(partial, path)


def as_line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def run_jobs(
    run: Callable[[T], None], jobs: list[T], workers: int, done: int = 0, unit: str = "cell", progress: bool = True
) -> None:
    """`run` every job, in `workers` processes that share the threads of this one.

    Args:
        run: can be pickled if there are several workers.
        done: jobs that were done before, for the progress bar.
        unit: what a job is called in it.
        progress: show the bar.
    """
    shown = {"desc": f"{unit}s", "unit": unit, "mininterval": 1, "disable": not progress}
    bar = tqdm(total=done + len(jobs), initial=done, **shown)
    if workers == 1:
        for job in jobs:
            run(job)
            bar.update()
        return
    # Spawned: a forked child of a process with threads of PyTorch may hang.
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // workers)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker, initargs=(threads,)) as pool:
        try:
            with _without_interrupts():
                futures = [pool.submit(run, job) for job in jobs]
            for future in as_completed(futures):
                future.result()
                bar.update()
        except BaseException:
            # The end of the block would wait until all jobs are done.
            processes = list((pool._processes or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
            raise


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C waits until the end of the block; children that start in it never see it: their parent ends them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(threads: int) -> None:
    """Set up a worker: its share of the threads, and an end with its parent, even one that was killed."""
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    # A worker that went on would write into the files of the run that replaces this one.
    os._exit(1)


__all__ = ["as_line", "complete_records", "read_records", "run_jobs"]
