"""Lines of shell blocks, run one by one in this process, as a shell would: pipes, redirections, variables, comments."""

from __future__ import annotations

import importlib
import io
import os
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from transformers.utils import logging

from tests.docs.not_run import PROJECT, why_line_is_not_run

# Programs of the system that a line may use.
SYSTEM = ("cat", "cp", "echo", "ls", "mkdir", "rm", "sha256sum", "test")
CODE = "# exit code "


def logical_lines(block: str) -> list[str]:
    """Lines with their continuations: behind a backslash or a pipe."""
    lines: list[str] = []
    open_line = ""
    for line in block.splitlines():
        open_line += line.rstrip()
        if open_line.endswith("\\"):
            open_line = open_line[:-1]
        elif open_line.endswith("|"):
            open_line += " "
        else:
            if shlex.split(open_line, comments=True):
                lines.append(open_line)
            open_line = ""
    assert not open_line, f"the line is not finished: {open_line}"
    return lines


def split_line(line: str) -> tuple[list[list[str]], str | None]:
    """The commands of a pipe, and the file that the last one's output goes to."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|><;&")
    lexer.whitespace_split = lexer.commenters = "#"  # type: ignore[assignment]
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    target, words = None, list(lexer)
    while words:
        word = words.pop(0)
        if word == "|":
            commands.append([])
        elif word == ">":
            target = words.pop(0)
        else:
            assert word not in ("<", ">>", "&&", "||", ";", "&"), f"{word!r} is more shell than this runs: {line}"
            commands[-1].append(word)
    return commands, target


class Shell:
    """Runs lines and remembers exported variables.

    Args:
        patch: where environment and arguments are set, until the test ends.
        programs: further programs, functions of (arguments, standard input) -> standard output.
    """

    def __init__(self, patch: pytest.MonkeyPatch, programs: dict[str, Callable[[list[str], str], str]]):
        self.patch = patch
        own = {"python": self._python, "semtoken": self._semtoken, "export": self._export}
        self.programs: dict[str, Any] = {**own, **programs}

    def run_line(self, line: str) -> str:
        """Standard output of a line.

        Raises:
            AssertionError: it ends with another exit code than the line's comment says (`# exit code 3`), or 0.
        """
        expected = int(line.split(CODE)[1].split()[0].rstrip(",;:")) if CODE in line else 0
        commands, target = split_line(line)
        text = ""
        for number, words in enumerate(commands):
            is_last = number == len(commands) - 1
            if check := why_line_is_not_run(" ".join(words)):
                check(words, self.command)
                continue
            text = self.command(words, text, expected if is_last else 0)
        if target is None:
            return text
        with open(target, "w", encoding="utf-8") as handle:
            handle.write(text)
        return ""

    def command(self, words: list[str], stdin: str = "", expected: int = 0) -> str:
        """Standard output of one command."""
        program, *arguments = words
        if program in SYSTEM:
            done = subprocess.run(words, input=stdin, capture_output=True, text=True, check=False)
            assert done.returncode == expected, f"{words}: exit code {done.returncode}\n{done.stderr}"
            return done.stdout
        known = self.programs.get(program)
        assert known is not None, f"no test knows the program {program!r}: run it, or list it in not_run.py"
        with self.patch.context() as patch:
            # As a terminal of its own would have it, and no line may change the next.
            out, verbosity = (
                io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True),
                logging.get_verbosity(),
            )
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8"))
            patch.setattr(sys, "argv", words)
            for name in ("COLUMNS", "TERMINAL_WIDTH"):
                patch.setenv(name, "200")
            code, answer = 0, ""
            try:
                answer = known(arguments, stdin) or ""
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
                reason = end.code
            finally:
                logging.set_verbosity(verbosity)
                logging.enable_progress_bar()
            text = out.buffer.getvalue().decode() + answer
        if code != expected:
            raise AssertionError(f"{' '.join(words)}: exit code {code} ({reason})\n{text[-3000:]}")
        return text

    def _python(self, arguments: list[str], _: str) -> str:
        self.patch.setattr(sys, "argv", arguments)
        runpy.run_path(arguments[0], run_name="__main__")
        return ""

    def _semtoken(self, _: list[str], __: str) -> str:
        module, name = PROJECT["scripts"]["semtoken"].split(":")
        getattr(importlib.import_module(module), name)()  # it reads `sys.argv`
        return ""

    def _export(self, arguments: list[str], _: str) -> str:
        for pair in arguments:
            name, value = pair.split("=", 1)
            self.patch.setenv(name, os.path.expandvars(value))
        return ""
