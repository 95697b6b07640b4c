#!/usr/bin/env python
"""Break it: random valid calls of `compress`, `forward`, `generate` and caches, each with an oracle; see `tests/fuzz`.

    python scripts/fuzz.py --calls 100000 --workers 2 --output docs/fuzz.md

A call ends in a result that an oracle finds correct, or as plain Transformers does on the same input; everything else
is a failure and makes the exit code 1. Children make the calls, so that a crash or a hang costs one case. A stopped run
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
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import transformers
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
BATCH = 200
# Batches of a child, after which it is replaced, so that what it keeps does not add up.
BATCHES_PER_CHILD = 40
KINDS = ("result", "as in Transformers", "failure")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100_000, help="over all families (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", nargs="+", help="only these")
    parser.add_argument("--output", type=Path, default=Path("fuzz.md"), help="Markdown report, with JSON beside it")
    parser.add_argument("--any_code", action="store_true", help="count what earlier code has done, too")
    return parser.parse_args()


def fingerprint() -> str:
    """Of the shipped modules, the suite and Transformers: a report is about one of each."""
    digest = hashlib.sha256(transformers.__version__.encode())
    for file in sorted([*(ROOT / "src/semtoken_hf").glob("*.py"), *(ROOT / "tests/fuzz").glob("*.py")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


class Child:
    """A process that makes calls; replaced when it dies."""

    def __init__(self, folder: Path):
        self.folder, self.batches = folder, 0
        self.process: subprocess.Popen[str] | None = None
        self.is_closed = False

    def start(self) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
        own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": str(self.folder)}
        return subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.campaign", str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **own},
            start_new_session=True,
        )

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process, self.batches = None, 0

    def run(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The counts of a batch; a call that kills the child is a failure, and the others are made again."""
        deaths: list[dict[str, str]] = []
        while True:
            if self.batches >= BATCHES_PER_CHILD:
                self.stop()
            if self.process is None:
                self.process = self.start()
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            try:
                self.process.stdin.write(json.dumps(batch) + "\n")
                self.process.stdin.flush()
                answer = self.process.stdout.readline()
            except BrokenPipeError:
                answer = ""
            if self.is_closed:
                raise InterruptedError("the campaign was stopped")
            if answer:
                self.batches += 1
                result = json.loads(answer)
                result["failures"] += deaths
                result["made"] += len(deaths)
                result["counts"]["failure: "] = len(result["failures"])
                return {**{name: batch[name] for name in ("family", "seed", "calls")}, **result}
            code, note = self.process.wait(), self.folder / str(self.process.pid)
            if not note.exists() or not note.read_text():
                raise RuntimeError(
                    f"a child ended with {code} before its first call: run `python -m tests.fuzz.campaign`"
                )
            number, _, case = note.read_text().partition("\n")
            cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            deaths.append({"case": case, "detail": f"the process ended with {cause}", "trace": ""})
            batch = {**batch, "skip": [*batch["skip"], int(number)]}
            self.stop()


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
    return [{"family": name, "seed": seed, "calls": calls, "skip": []} for _, name, seed, calls in sorted(batches)]


def run_batches(batches: list[dict[str, Any]], arguments: argparse.Namespace, state: Path, code: str) -> None:
    """Make the calls, and note each finished batch in `state`."""
    memory = Path("/dev/shm")
    with (
        tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder,
        state.open("a", encoding="utf-8") as notes,
        ThreadPoolExecutor(arguments.workers) as pool,
        tqdm(total=sum(batch["calls"] for batch in batches), unit="call", smoothing=0.05) as bar,
    ):
        children = [Child(Path(folder)) for _ in range(arguments.workers)]
        free: SimpleQueue[Child] = SimpleQueue()
        for child in children:
            free.put(child)

        def run(batch: dict[str, Any]) -> dict[str, Any]:
            child = free.get()
            try:
                return child.run(batch)
            finally:
                free.put(child)

        try:
            for result in pool.map(run, batches):
                notes.write(json.dumps({**result, "code": code}) + "\n")
                notes.flush()
                bar.update(result["calls"])
                bar.set_postfix(failures=len(result["failures"]))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in children:
                child.is_closed = True
                if child.process is not None:
                    child.process.kill()


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
        run_batches([batch for batch in batches if key(batch) not in done], arguments, state, code)
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
