#!/usr/bin/env python
"""Change the core in one place at a time, and see whether the tests notice.

    python scripts/mutants.py --count 60 --output mutants.json tests/test_compress.py tests/laws/test_law05_ratio.py

Works on a clone, which it changes and restores: run it in one of its own. A mutant swaps an operator, a comparison, a
small number or a truth value in a module of CORE. The tests of that module (those that import it) run first, then the
given ones. A stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE, TESTS = ROOT / "src" / "semtoken_hf", ROOT / "tests"
CORE = (
    *("token_layout", "span_planner", "span_clustering", "granularity", "sentence_selection", "question_finding"),
    *("span_merging", "compression", "cache_semtoken", "read_positions", "causal_lm_semtoken", "modeling_semtoken"),
    *("pretrained_semtoken", "generation_semtoken", "semantic_encoder", "varlen_semtoken"),
)
COMPARISONS = {
    **{ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">")},
    **{ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is")},
}
OPERATORS = {
    **{ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "+")},
    **{ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&")},
}
# A place in a file: first byte, bytes, what comes in their stead.
Place = tuple[int, int, str]


def places_of(path: Path) -> Iterator[Place]:
    """Where a module can be changed; annotations and what is raised are left alone."""
    source = path.read_bytes()
    tree = ast.parse(source)
    offsets = [0]
    for line in source.splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line))

    def start(node: ast.expr) -> int:
        return offsets[node.lineno - 1] + node.col_offset

    def end(node: ast.expr) -> int:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return offsets[node.end_lineno - 1] + node.end_col_offset

    def between(left: ast.expr, right: ast.expr, old: str, new: str) -> Iterator[Place]:
        text = source[end(left) : start(right)].decode()
        if old in text and "\n" not in text:
            yield end(left) + len(text[: text.index(old)].encode()), len(old), new

    skipped = set()
    for node in ast.walk(tree):
        parts = [getattr(node, name, None) for name in ("annotation", "returns")]
        parts += [node] if isinstance(node, ast.Raise) else []
        skipped |= {id(inner) for part in parts if part is not None for inner in ast.walk(part)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
            yield from between(node.left, node.comparators[0], *COMPARISONS[type(node.ops[0])])
        elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS and not isinstance(node.left, ast.Constant):
            yield from between(node.left, node.right, *OPERATORS[type(node.op)])
        elif isinstance(node, ast.BoolOp):
            words = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
            yield from between(node.values[0], node.values[1], *words)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield start(node), len("not "), ""
        elif isinstance(node, ast.Constant) and type(node.value) is bool:
            yield start(node), end(node) - start(node), str(not node.value)
        elif isinstance(node, ast.Constant) and type(node.value) is int and 0 <= node.value <= 2:
            yield start(node), end(node) - start(node), str(node.value + 1)


def tests_of(module: str) -> list[str]:
    """The test files at the top that import a module, its namesake first."""
    files = sorted(TESTS.glob("test_*.py"), key=lambda file: (file.stem != f"test_{module}", file.name))
    return [
        file.relative_to(ROOT).as_posix()
        for file in files
        if file.stem == f"test_{module}" or re.search(rf"semtoken_hf\.{module}\b", file.read_text(encoding="utf-8"))
    ]


def try_mutant(path: Path, place: Place, tests: list[str]) -> str:
    """What becomes of a change: killed, survived, or too slow."""
    source, (first, count, new) = path.read_bytes(), place
    path.write_bytes(source[:first] + new.encode() + source[first + count :])
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    try:
        files = list(dict.fromkeys([*tests_of(path.stem), *tests]))
        ended = subprocess.run([*command, *files], cwd=ROOT, env=environment, capture_output=True, timeout=600)
        return {0: "survived", 1: "killed"}.get(ended.returncode, f"pytest ended with {ended.returncode}")
    except subprocess.TimeoutExpired:
        return "too slow"
    finally:
        path.write_bytes(source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="+", help="test files that run behind those of the module")
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output", type=Path, required=True, help="JSON of what is done")
    arguments = parser.parse_args()
    everywhere = [(SOURCE / f"{name}.py", place) for name in CORE for place in places_of(SOURCE / f"{name}.py")]
    chosen = random.Random(arguments.seed).sample(everywhere, arguments.count)
    done = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    for path, place in chosen[len(done) :]:
        begin, line = time.monotonic(), path.read_bytes()[: place[0]].count(b"\n") + 1
        result = try_mutant(path, place, arguments.tests)
        done.append({"file": path.name, "line": line, "new": place[2], "result": result})
        arguments.output.write_text(json.dumps(done, indent=1))
        print(f"{result}: {path.name}:{line} -> {place[2]!r} ({time.monotonic() - begin:.0f} s)", flush=True)
    killed = sum(mutant["result"] != "survived" for mutant in done)
    print(f"{killed} of {len(done)} were noticed")


if __name__ == "__main__":
    main()
