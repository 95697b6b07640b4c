"""Somebody who reads a document and runs every block of it, in order."""

from __future__ import annotations

import contextlib
import io
import json
import re
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.docs.blocks import Block
from tests.docs.named_things import NamedThings
from tests.docs.not_run import is_block_left_out
from tests.docs.servers import InProcessServer, StandInEngine
from tests.docs.shell import Shell, logical_lines, split_line
from tests.fixtures.children import ROOT
from tests.hub.hub_server import HubServer

# Of commands that write to a folder: where its name stands, as an option or as the number of the argument.
WRITES: tuple[tuple[tuple[str, ...], str | int], ...] = (
    (("convert", "scripts/convert.py"), 2),
    (("push", "scripts/push_to_hub.py"), 1),
    (("adapt", "scripts/adapt.py", "evaluate", "scripts/evaluate.py", "benchmark"), "--output-dir"),
    (("scripts/export_prompt_embeds.py",), "--export-plain"),
    (("inspect",), "--html"),
)

# What `sha256sum --check` reads.
DIGEST = re.compile(r"[0-9a-f]{64}  \S+")


class UnknownBlock(AssertionError):
    """A block that is neither run nor listed in `not_run.py`."""


class Reader:
    """Runs blocks in one folder and one Python namespace.

    Args:
        folder: the working directory.
        things: makes what the blocks name.
        hub: the Hub that they know.
        namespace: what they take as given.
        patch: of the test.
        server: `transformers serve`.
    """

    def __init__(
        self,
        folder: Path,
        things: NamedThings,
        hub: HubServer,
        namespace: dict[str, Any],
        patch: pytest.MonkeyPatch,
        server: InProcessServer,
    ):
        self.folder, self.things, self.hub, self.namespace = folder, things, hub, namespace
        self.namespace |= {"openai": server.openai, "json": json}
        self.shell = Shell(patch, {"transformers": server.transformers, "curl": self._curl})
        self.output: str | None = None

    def run(self, block: Block) -> None:
        """Run a block, or compare it with what the one before printed.

        Raises:
            UnknownBlock: nothing says what to do with it.
        """
        if is_block_left_out(block.document, block.text):
            self.output = None
        elif block.language == "python":
            self.output = self.run_python(block)
        elif block.language == "bash":
            self.output = "".join(self.run_line(line) for line in logical_lines(block.text))
        elif block.language == "text" and block.follows and self.output is not None:
            assert_same(block, self.output)
            self.output = None
        elif block.language == "text" and all(map(DIGEST.fullmatch, block.text.splitlines())):
            folder = (ROOT / block.document).parent
            subprocess.run(["sha256sum", "--check", "--quiet"], cwd=folder, input=block.text, text=True, check=True)
        else:
            raise UnknownBlock(f"{block.place}: a block {block.language!r} is neither run nor listed in not_run.py")

    def run_python(self, block: Block) -> str:
        """What a block of Python prints."""
        text = string.Template(block.text).safe_substitute(path="model_cards/semtoken-llama-tiny")
        self.things.prepare(text, self.folder, self.hub, set())
        self._stand_in_for_vllm(text)
        # Behind empty lines, so that a traceback names the line of the document.
        code = compile("\n" * (block.line - 1) + text, block.document, "exec")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, self.namespace)
        return printed.getvalue()

    def run_line(self, line: str) -> str:
        """What a line of shell prints."""
        commands, _ = split_line(line)
        created = {name for words in commands for name in written_by(words)}
        self.things.prepare(" ".join(word for words in commands for word in words), self.folder, self.hub, created)
        return self.shell.run_line(line)

    def _stand_in_for_vllm(self, text: str) -> None:
        if "prompt_embeds" not in text:
            return
        from transformers import AutoModelForCausalLM, AutoTokenizer

        def create(model: str, prompt: None, extra_body: dict[str, Any]) -> Any:
            return StandInEngine(model, True).complete({"prompt": prompt, **extra_body})

        self.namespace |= {
            "model": AutoModelForCausalLM.from_pretrained("my-semtoken"),
            "tokenizer": AutoTokenizer.from_pretrained("my-semtoken"),
            "client": _Client(create),
            "LLM": StandInEngine,
        }

    def _curl(self, arguments: list[str], stdin: str) -> str:
        return StandInEngine("my-plain", True).curl(arguments, stdin)


class _Client:
    """`openai.OpenAI` as far as completions go."""

    def __init__(self, create: Any):
        self.completions = self
        self.create = create


def written_by(words: list[str]) -> list[str]:
    """Names that a command creates."""
    arguments = [word for word in words[1:] if not word.startswith("-")]
    found = []
    for commands, where in WRITES:
        if len(words) < 2 or words[1] not in commands:
            continue
        if isinstance(where, int):
            found += arguments[where + 1 : where + 2]
        elif where in words:
            found.append(words[words.index(where) + 1])
    return found


def assert_same(block: Block, output: str) -> None:
    """The text block is what was printed, but for spaces at the ends of lines."""
    claimed, printed = ([line.rstrip() for line in text.strip("\n").splitlines()] for text in (block.text, output))
    if claimed != printed:
        sys.stderr.write(output)
    assert claimed == printed, f"{block.place}: the block before prints something else"
