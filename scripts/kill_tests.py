#!/usr/bin/env python
"""Kill tiny runs of the commands that write much, run each again, and compare with runs that nothing disturbed.

    python scripts/kill_tests.py                                         # twenty kills of each, two minutes
    python scripts/kill_tests.py --times 100 --seed 1 --programs convert
    python scripts/kill_tests.py --output docs/reports/kill_tests.md

Each kill comes at a random change of the folder (a file opened for writing, a rename, a new or removed folder); in
every fifth run the resumed run is killed, too. After each kill, what can be seen is checked: a checkpoint that loads is
whole, a file of results or a plot is whole. Exits with 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A thread each: the models are tiny, and children are forked.
os.environ.setdefault("OMP_NUM_THREADS", "1")
SAME = {
    "convert": "the folder, byte for byte",
    "adapt": "the adapted folder, byte for byte, and the curve",
    "evaluate": "the predictions and `metrics.json`, but for times",
    "compress-dataset": "the folder, byte for byte",
}
HEADER = [
    "| program | variants | changes of its folder | runs | kills | wrong |",
    "|---|---|---|---|---|---|",
]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="kills of each program (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--programs", nargs="+", choices=list(SAME), default=list(SAME))
    parser.add_argument("--output", type=Path, help="Markdown file for what is printed")
    return parser


def main() -> int:
    arguments = build_parser().parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]
    from semtoken_hf.evaluation.provenance import publish_report

    kills = importlib.import_module("tests.hardening.kills")
    rows, failures = [], []
    for name in arguments.programs:
        with tempfile.TemporaryDirectory() as folder:
            killer = kills.Killer(name, Path(folder) / name, plots=True)
            found = killer.kill(arguments.times, arguments.seed)
        variants = ", ".join(filter(None, killer.job.variants)) or "-"
        changes = max(killer.changes.values())
        rows.append(f"| {name} | {variants} | {changes} | {found.runs} | {found.kills} | {len(found.failures)} |")
        failures += found.failures
    lines = [
        "# Kill tests",
        "",
        f"`SIGKILL` at random changes (seed {arguments.seed}) of tiny runs, then the same command again. What must be",
        "the same as after a run that nothing disturbed:",
        "",
        *(f"- {name}: {SAME[name]}" for name in arguments.programs),
        "",
        *HEADER,
        *rows,
        "",
        "Wrong would be: another result, half a checkpoint or half a file under the name of a whole one, or leftovers",
        "after the run that finished. `.tmp` folders are what a kill leaves and the next run removes.",
    ]
    if failures:
        lines += ["", "## What was wrong", "", *(f"- {failure}" for failure in failures)]
    publish_report(lines, arguments.output)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
