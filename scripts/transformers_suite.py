#!/usr/bin/env python
"""Transformers' own model tests on our Llama with compression off, beside plain Llama.

    python scripts/transformers_suite.py
    python scripts/transformers_suite.py --source transformers    # a checkout, at the tag of the installed version

Without `--source`, pip downloads the source of the installed version. It holds the common tests of models alone: those
of `generate` and of exporting need a checkout. Needs `pip install parameterized`. Fails where plain Llama passes a test
and ours does not.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import transformers

CASES = Path(__file__).with_name("transformers_suite_cases.py")
PLAIN, OURS = "PlainLlamaTest", "SemTokenLlamaTest"
# Modules that the common tests import and released sources lack, as they are where they hold no test.
STANDINS = {
    "generation/test_utils.py": "class GenerationTesterMixin: ...\n",
    "exporters/test_export.py": "class ExportTesterMixin: ...\n",
    "utils/test_configuration_utils.py": "config_common_kwargs: dict = {}\n",
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="folder of Transformers' source, with tests/ in it")
    parser.add_argument("-k", dest="chosen", help="as in pytest")
    return parser.parse_args()


def download_source(folder: Path) -> Path:
    """The released source of the installed Transformers, unpacked in `folder`."""
    name = f"transformers-{transformers.__version__}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command = [*pip, "--no-binary", ":all:", "--dest", str(folder), name.replace("-", "==")]
    subprocess.run(command, check=True)
    with tarfile.open(folder / f"{name}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / name


def lay_out(source: Path, folder: Path) -> list[str]:
    """The tests of `source` and our cases as a package in `folder`; returns the modules that had to be stood in for."""
    tests = folder / "tests"
    tests.mkdir()
    for entry in (source / "tests").iterdir():
        (tests / entry.name).symlink_to(entry.resolve())
    missing = [name for name in STANDINS if not (tests / name).exists()]
    files = {name: STANDINS[name] for name in missing} | {"semtoken/test_llama.py": CASES.read_text(encoding="utf-8")}
    for name, text in files.items():
        (tests / name).parent.mkdir()
        (tests / name).write_text(text, encoding="utf-8")
        (tests / name).with_name("__init__.py").touch()
    (tests / "__init__.py").touch()
    return missing


def run_tests(folder: Path, chosen: str | None) -> dict[str, dict[str, tuple[str, str]]]:
    """Outcome ("passed", "failed", "skipped") and reason of every test, by class and name."""
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/semtoken", f"--junitxml={report}"]
    command += ["-k", chosen] if chosen else []
    code = subprocess.run(command, cwd=folder, env={**os.environ, "HF_HUB_OFFLINE": "1"}).returncode
    if code > 1:
        raise SystemExit(f"the tests could not be run (pytest ended with {code}): is --source of another version?")
    found: dict[str, dict[str, tuple[str, str]]] = {PLAIN: {}, OURS: {}}
    for case in ElementTree.parse(report).iter("testcase"):
        of_class = found[str(case.get("classname")).rsplit(".", 1)[-1]]
        name, kinds = str(case.get("name")), {child.tag: child.get("message") or "" for child in case}
        # A test with subtests has an entry for each, the worst of which counts.
        if bad := kinds.get("failure", kinds.get("error")):
            of_class[name] = "failed", bad.splitlines()[0]
        elif of_class.get(name, ("passed",))[0] == "passed":
            of_class[name] = ("skipped", kinds["skipped"]) if "skipped" in kinds else ("passed", "")
    return found


def print_report(found: dict[str, dict[str, tuple[str, str]]], missing: list[str]) -> bool:
    """Returns whether ours passes whatever plain Llama passes."""
    print(f"\nTransformers {transformers.__version__}")
    for name, tests in found.items():
        counts = Counter(outcome for outcome, _ in tests.values())
        print(f"{name}: {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
    passed = {name for name, (outcome, _) in found[PLAIN].items() if outcome == "passed"}
    worse = [name for name, (outcome, _) in found[OURS].items() if name in passed and outcome != "passed"]
    for name in worse:
        print(f"passed by plain Llama alone: {name}: {': '.join(found[OURS][name])}")
    for name, (outcome, reason) in found[OURS].items():
        if outcome == "failed" and name not in worse:
            print(f"failed by both: {name}: {reason}")
    print("skipped by both, and why:")
    reasons = Counter(reason for name, (kind, reason) in found[OURS].items() if kind == "skipped" and name not in worse)
    for reason, count in reasons.most_common():
        print(f"  {count} x {reason}")
    for name in missing:
        print(f"not run, since the source has no tests/{name}: its tests")
    return not worse


def main() -> int:
    arguments = parse_arguments()
    if find_spec("parameterized") is None:
        raise SystemExit("Transformers' tests need parameterized: pip install parameterized")
    if arguments.source is not None and not (arguments.source / "tests" / "test_modeling_common.py").is_file():
        raise SystemExit(f"--source {arguments.source} holds no tests/test_modeling_common.py: name a checkout")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        missing = lay_out(arguments.source or download_source(folder), folder)
        return 0 if print_report(run_tests(folder, arguments.chosen), missing) else 1


if __name__ == "__main__":
    sys.exit(main())
