#!/usr/bin/env python
"""Break it: random valid calls of `compress`, `forward`, `generate` and caches, each with an oracle; see `tests/fuzz`.

    python scripts/fuzz.py --calls 100000 --workers 2 --output docs/reports/fuzz.md

A call ends in a result that an oracle finds correct, or as plain Transformers does on the same input; everything else
is a failure and makes the exit code 1. Children make the calls, so that a crash or a hang costs a batch. A stopped run
goes on where it was, as long as the code is the same; what is done lies beside the report (`.state.jsonl`).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import transformers
from tqdm import tqdm

from semtoken_hf.evaluation.option_names import DashedParser

ROOT = Path(__file__).resolve().parents[1]
# Calls of a child.
BATCH = 2000
KINDS = ("result", "as in Transformers", "failure")


def parse_arguments() -> argparse.Namespace:
    parser = DashedParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100_000, help="over all families (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", nargs="+", help="only these")
    parser.add_argument("--output", type=Path, default=Path("fuzz.md"), help="Markdown report, with JSON beside it")
    parser.add_argument("--any-code", action="store_true", help="count what earlier code has done, too")
    return parser.parse_args()


def fingerprint() -> str:
    """Of the shipped modules, the suite and Transformers: a report is about one of each."""
    digest = hashlib.sha256(transformers.__version__.encode())
    for file in sorted([*(ROOT / "src/semtoken_hf").glob("*.py"), *(ROOT / "tests/fuzz").glob("*.py")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def run_child(batch: dict[str, Any]) -> dict[str, Any]:
    """What became of a batch; a child that dies is a failure, which its seed repeats."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    arguments = [batch["family"], str(batch["seed"]), str(batch["calls"])]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.campaign", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **own},
        check=False,
    )
    if done.returncode == 0:
        return {**batch, **json.loads(done.stdout)}
    detail = f"the process of {' '.join(arguments)} ended with {done.returncode}"
    failure = {"case": " ".join(arguments), "detail": detail, "trace": done.stderr[-4000:]}
    return {**batch, "made": 0, "counts": {"failure: ": 1}, "failures": [failure]}


def plan(arguments: argparse.Namespace, families: dict[str, Any]) -> list[dict[str, Any]]:
    """Batches of all families by weight, in turn."""
    names = arguments.families or list(families)
    total = sum(families[name].weight for name in names)
    batches = []
    for name in names:
        left, number = round(arguments.calls * families[name].weight / total), 0
        while left > 0:
            calls = min(BATCH, left)
            batches.append((number / families[name].weight, name, arguments.seed * 10**6 + number, calls))
            left, number = left - calls, number + 1
    return [{"family": name, "seed": seed, "calls": calls} for _, name, seed, calls in sorted(batches)]


def run_batches(batches: list[dict[str, Any]], workers: int, state: Path, code: str) -> None:
    """Make the calls, and note each finished batch in `state`."""
    with (
        state.open("a", encoding="utf-8") as notes,
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=sum(batch["calls"] for batch in batches), unit="call", smoothing=0.05) as bar,
    ):
        try:
            for result in pool.map(run_child, batches):
                notes.write(json.dumps({**result, "code": code}) + "\n")
                notes.flush()
                bar.update(result["calls"])
                bar.set_postfix(failures=len(result["failures"]))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def read_state(state: Path, code: str | None) -> list[dict[str, Any]]:
    """What is done, by this code; None: by any."""
    lines = state.read_text(encoding="utf-8").splitlines() if state.exists() else []
    results = [json.loads(line) for line in lines if line.endswith("}")]
    return [result for result in results if code is None or result["code"] == code]


def key(batch: dict[str, Any]) -> tuple[Any, ...]:
    return batch["family"], batch["seed"], batch["calls"]


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts by family and by kind, and failures."""
    summary: dict[str, Any] = {"families": {}, "kinds": Counter(), "failures": []}
    for name in dict.fromkeys(result["family"] for result in results):
        mine = [result for result in results if result["family"] == name]
        kinds: Counter[str] = Counter()
        for result in mine:
            for label, count in result["counts"].items():
                kinds[label.split(":")[0]] += count
                summary["kinds"][f"{name}: {label}"] += count
            summary["failures"] += [{"family": name, **failure} for failure in result["failures"]]
        summary["families"][name] = {
            "calls": sum(result["made"] for result in mine),
            **{kind: kinds[kind] for kind in KINDS},
        }
    summary["calls"] = sum(family["calls"] for family in summary["families"].values())
    summary["code"] = sorted({result["code"] for result in results})
    return summary


def render(summary: dict[str, Any]) -> list[str]:
    """The report's lines of Markdown."""
    families = summary["families"]
    failures = len(summary["failures"])
    lines = [
        "# Fuzzing",
        "",
        f"{summary['calls']:,} random valid calls, {failures} failures. A call ends in a result that an oracle finds "
        "correct, or, where plain Transformers fails in the same way on the same input, as there. See `tests/fuzz` for "
        "what is drawn and what is correct.",
        "",
        "| calls of | calls | correct results | as in Transformers | failures |",
        "|---|---|---|---|---|",
    ]
    for name, one in families.items():
        counts = " | ".join(f"{one[kind]:,}" for kind in KINDS)
        lines.append(f"| {name} | {one['calls']:,} | {counts} |")
    lines += ["", "| calls of | became | calls |", "|---|---|---|"]
    for label, count in sorted(summary["kinds"].items(), key=lambda item: (item[0].split(":")[0], -item[1])):
        family, _, what = label.partition(": ")
        if count:
            lines.append(f"| {family} | {what.removesuffix(': ')} | {count:,} |")
    if failures:
        lines += ["", "## Failures", ""]
        lines += [
            f"- {one['family']}: {one['detail'][:300]}: `{one['case'][:600]}`" for one in summary["failures"][:50]
        ]
    if len(summary["code"]) > 1:
        lines += ["", f"These calls were made on {len(summary['code'])} versions of the code."]
    return [*lines, "", "Shipped modules and suite (SHA-256, shortened): `" + "`, `".join(summary["code"]) + "`", ""]


def main() -> int:
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]
    files = importlib.import_module("semtoken_hf.evaluation.files")
    provenance = importlib.import_module("semtoken_hf.evaluation.provenance")
    families = importlib.import_module("tests.fuzz.families").FAMILIES
    arguments, code = parse_arguments(), fingerprint()
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell has started it in the background
        signal.signal(number, signal.default_int_handler)
    state = arguments.output.with_suffix(".state.jsonl")
    state.parent.mkdir(parents=True, exist_ok=True)
    batches = plan(arguments, families)
    wanted = {key(batch) for batch in batches}
    done = {key(result) for result in read_state(state, None if arguments.any_code else code)}
    try:
        run_batches([batch for batch in batches if key(batch) not in done], arguments.workers, state, code)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    found = read_state(state, None if arguments.any_code else code)
    results = list({key(result): result for result in found if key(result) in wanted}.values())
    summary = summarise(results)
    summary["provenance"] = provenance.provenance()
    files.write_text(arguments.output.with_suffix(".json"), json.dumps(summary, indent=1) + "\n")
    provenance.publish_report(render(summary), arguments.output)
    return 1 if summary["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
