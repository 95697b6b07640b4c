"""Fenced code blocks of the documents with the lines where they stand, and the programs that shell blocks name."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from unittest import mock

import tomllib

from tests.fixtures.children import ROOT

FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^ *```$", re.DOTALL | re.MULTILINE)
# Reports that scripts write (`docs/reports/*.md`) quote their command in a line, not in a block.
PATTERNS = ("README.md", "SECURITY.md", "docs/*.md", "model_cards/*/README.md")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@dataclass(frozen=True)
class Block:
    """A fenced block: path of its document, 1-based line of its text, language, and the text without its indent.

    `follows`: nothing but empty lines parts it from the block before.
    """

    document: str
    line: int
    language: str
    text: str
    follows: bool


def documents() -> list[str]:
    """Every document, as paths from the root."""
    return sorted({str(path.relative_to(ROOT)) for pattern in PATTERNS for path in ROOT.glob(pattern)})


def read_blocks(document: str) -> list[Block]:
    """The blocks of a document in order."""
    content = (ROOT / document).read_text(encoding="utf-8")
    blocks, end = [], 0
    for match in FENCE.finditer(content):
        text = "".join(line.removeprefix(match["indent"]) for line in match["text"].splitlines(keepends=True))
        follows = bool(blocks) and not content[end : match.start()].strip()
        blocks.append(
            Block(document, content.count("\n", 0, match.start("text")) + 1, match["language"], text, follows)
        )
        end = match.end()
    return blocks


def commands(block: Block) -> list[list[str]]:
    """The words of every command of a shell block."""
    lines = re.sub(r"\\\n|\|\n", lambda found: found[0].replace("\n", "").replace("\\", " "), block.text).splitlines()
    words = [shlex.split(part, comments=True) for line in lines for part in re.split(r" \|(?: |$)", line)]
    return [command for command in words if command]


@functools.cache
def help_of(*program: str) -> str:
    """What `semtoken COMMAND --help` or `python scripts/NAME.py --help` prints, in a wide terminal."""
    arguments = [*program[1:], "--help"] if program[0] == "python" else [*program, "--help"]
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    wide = mock.patch.dict("os.environ", COLUMNS="200", TERMINAL_WIDTH="200")
    with (
        wide,
        mock.patch.object(sys, "argv", arguments),
        contextlib.redirect_stdout(out),
        contextlib.suppress(SystemExit),
    ):
        if program[0] == "python":
            runpy.run_path(str(ROOT / program[1]), run_name="__main__")
        else:
            module, name = PROJECT["scripts"]["semtoken"].split(":")
            getattr(importlib.import_module(module), name)()
    return out.buffer.getvalue().decode()


def options_in(text: str) -> set[str]:
    """Long options in a text."""
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text))
