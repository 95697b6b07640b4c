"""A child of a campaign: batches of cases come in as lines of JSON, counts go out; it may crash or be killed.

    python -m tests.fuzz.campaign FOLDER

Before each call it writes the case into `FOLDER/<process id>`, where the parent finds what a dead child was doing.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from transformers.utils import logging as transformers_logging

from .families import FAMILIES
from .judging import SECONDS, judge

LONGEST_CASE = 3000


def run_batch(batch: dict[str, Any], current: int) -> dict[str, Any]:
    """Make the calls of a batch: `family`, `seed`, `calls`, and `skip`, those that have killed a child before."""
    family, number = FAMILIES[batch["family"]], 0
    counts: Counter[str] = Counter()
    failures: list[dict[str, str]] = []

    @seed(batch["seed"])
    @settings(
        max_examples=batch["calls"],
        database=None,
        phases=[Phase.generate],
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(family.cases)
    def call(case: Any) -> None:
        nonlocal number
        number += 1
        if number in batch["skip"]:
            return
        text = repr(case)[:LONGEST_CASE]
        note = f"{number}\n{text}".encode(errors="backslashreplace")
        os.ftruncate(current, 0)
        os.pwrite(current, note, 0)
        # For what does not come back to Python, where a signal could be handled.
        faulthandler.dump_traceback_later(3 * SECONDS, exit=True)
        verdict = judge(family, case)
        faulthandler.cancel_dump_traceback_later()
        counts[f"{verdict.kind}: {verdict.detail if verdict.kind != 'failure' else ''}"] += 1
        if verdict.kind == "failure":
            failures.append({"case": text, "detail": verdict.detail, "trace": verdict.trace[-4000:]})

    call()
    # Where there are fewer different cases than asked for, these are all.
    return {"failures": failures, "made": sum(counts.values()), "counts": counts}


def main() -> None:
    # What a call prints must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    faulthandler.enable()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    current = os.open(Path(sys.argv[1]) / str(os.getpid()), os.O_RDWR | os.O_CREAT)
    for line in sys.stdin:
        print(json.dumps(run_batch(json.loads(line), current)), file=answers, flush=True)


if __name__ == "__main__":
    main()
