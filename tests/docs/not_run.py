"""The lines of shell blocks, and the blocks, that cannot run here: why, and what is checked instead.

Whatever is neither run nor listed here fails `test_code_blocks.py`.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
from collections.abc import Callable
from typing import Any

import tomllib
from transformers import TrainingArguments

from semtoken_hf.evaluation.option_names import dashed
from tests.fixtures.children import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def check_install(words: list[str], run: Any) -> None:
    """The extras that a `pip install -e '.[...]'` names are those of pyproject.toml."""
    for word in words[2:]:
        if extras := re.fullmatch(r"\.\[([\w,-]+)\]|semtoken-hf\[([\w,-]+)\]", word):
            for extra in (extras[1] or extras[2]).split(","):
                assert extra in PROJECT["optional-dependencies"], f"pyproject.toml has no extra {extra!r}"


def check_options(words: list[str], run: Callable[[list[str]], str]) -> None:
    """The command's help knows every option of the line."""
    if words[0] == "accelerate":
        words = ["python", *words[2:]]
    head = [word for word in words[: 3 if words[0] == "python" else 2] if not word.startswith("-")]
    known = set(re.findall(r"--[\w-]+", run([*head[:2], "--help"]).replace("_", "-")))
    for word in words:
        name = word.split("=")[0].replace("_", "-")
        assert not name.startswith("--") or name in known, f"{' '.join(head)} has no option {word}"


def check_training(words: list[str], run: Callable[[list[str]], str]) -> None:
    """As `check_options`; the options of `TrainingArguments` are not all in the help."""
    known = {dashed(f"--{field.name}") for field in dataclasses.fields(TrainingArguments)}
    check_options([word for word in words if word not in known], run)


def check_script(words: list[str], run: Any) -> None:
    """A shell script: it is there and parses."""
    subprocess.run(["bash", "-n", ROOT / words[1]], check=True)


def check_nothing(words: list[str], run: Any) -> None:
    """Nothing of this package stands in the line."""


# Pattern of the whole line, the reason, and the check in place of running it; the first that fits counts.
LINES: tuple[tuple[str, str, Callable[[list[str], Any], None]], ...] = (
    (r"(python -m )?pip install .*", "needs the package index", check_install),
    (r"bash scripts/\S+\.sh.*", "sets up an environment from the package index", check_script),
    (r"vllm serve .*", "vLLM is not installed", check_nothing),
    (r"accelerate launch .*", "starts a process for each device", check_training),
    (r"python scripts/gpu_suite\.py.*", "needs a GPU; tests/gpu_suite runs its parts", check_options),
    (
        r"python scripts/train_reference\.py.*",
        "trains for hours; tests/training runs it on a tiny model",
        check_options,
    ),
    (r"python scripts/(measure|ablate|profile|kvpress)_\w+\.py.*", "measures for minutes or hours", check_options),
    (r"(semtoken|python scripts/)\W?benchmark.* --shapes .*", "hours; tests/benchmarking runs it", check_options),
    (r"(semtoken |python scripts/)evaluate(?!.*--fraction).*", "hours; tests/evaluation runs it whole", check_options),
    (r"(semtoken |python scripts/)adapt.* --max-steps [1-9]\d{2,}.*", "minutes; the defaults are run", check_training),
    (r"(semtoken lm-eval|lm_eval) .*--tasks (?!semtoken).*", "data sets of the Hub; test_lm_eval.py", check_options),
)

# Blocks by document (or "*") and a pattern of their text.
BLOCKS: tuple[tuple[str, str, str], ...] = (
    ("README.md", r"token ids ──", "a drawing"),
    ("README.md", r"Where does Sherwood", "what scripts/quickstart.sh prints after the minutes that it takes"),
)


def why_line_is_not_run(line: str) -> Callable[[list[str], Any], None] | None:
    """The check in place of running a line of shell, or None where it is run."""
    return next((check for pattern, _, check in LINES if re.fullmatch(pattern, line, re.DOTALL)), None)


def is_block_left_out(document: str, text: str) -> bool:
    """Whether a block is listed as one that no program reads."""
    return any(re.fullmatch(d.replace("*", ".*"), document) and re.match(p, text) for d, p, _ in BLOCKS)
