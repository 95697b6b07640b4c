"""A child of a campaign: the calls of one batch, and what became of them as a line of JSON; it may crash or be killed.

python -m tests.fuzz.campaign FAMILY SEED CALLS
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import warnings
from collections import Counter
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from transformers.utils import logging as transformers_logging

from .families import FAMILIES
from .judging import SECONDS, judge

LONGEST_CASE = 3000


def run_batch(name: str, number: int, calls: int) -> dict[str, Any]:
    """Make `calls` calls of a family; the seed `number` repeats them."""
    family, failures = FAMILIES[name], []
    counts: Counter[str] = Counter()

    @seed(number)
    @settings(
        max_examples=calls,
        database=None,
        phases=[Phase.generate],
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(family.cases)
    def call(case: Any) -> None:
        # For what does not come back to Python, where a signal could be handled.
        faulthandler.dump_traceback_later(3 * SECONDS, exit=True)
        verdict = judge(family, case)
        faulthandler.cancel_dump_traceback_later()
        counts[f"{verdict.kind}: {verdict.detail if verdict.kind != 'failure' else ''}"] += 1
        if verdict.kind == "failure":
            text = repr(case)[:LONGEST_CASE]
            failures.append({"case": text, "detail": verdict.detail, "trace": verdict.trace[-4000:]})

    call()
    # Where there are fewer different cases than asked for, these are all.
    return {"failures": failures, "made": sum(counts.values()), "counts": counts}


def main() -> None:
    # What a call prints must not be taken for the answer.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    faulthandler.enable()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    name, number, calls = sys.argv[1:]
    print(json.dumps(run_batch(name, int(number), int(calls))), file=answer, flush=True)


if __name__ == "__main__":
    main()
