"""Python blocks of the documents run and print what they claim; commands of shell blocks exist, with their options."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re

import pytest
from transformers import TrainingArguments
from transformers.utils import logging

from semtoken_hf.evaluation.option_names import dashed
from tests.docs.blocks import PROJECT, Block, commands, documents, help_of, options_in, read_blocks
from tests.fixtures.children import ROOT

BLOCKS = {document: read_blocks(document) for document in documents()}
# Blocks for a server, for an environment of their own, or that are modules, each with the test that runs them.
SERVERS = {
    "openai.OpenAI(": "integrations/test_serve.py",
    "LLM(": "serving/test_prompt_embeds.py",
    "compress_dataset(": "bulk/test_compress_dataset.py",
    "from .configuration_semtoken": "test_families.py",
    "from trl import": "training/test_trl.py",
}
# Whose options are not this package's.
FOREIGN = ("vllm", "transformers", "curl")


@pytest.fixture
def verbosity():
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


def printed_by(block: Block, namespace) -> str:
    # Behind empty lines, so that a traceback names the line of the document.
    code = compile("\n" * (block.line - 1) + block.text, block.document, "exec")
    printed = io.StringIO()
    if not any(call in block.text for call in SERVERS):
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
    return printed.getvalue()


def lines_of(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip("\n").splitlines()]


@pytest.mark.parametrize("document", [d for d, blocks in BLOCKS.items() if any(b.language == "python" for b in blocks)])
def test_python_blocks_run_and_print_what_stands_behind_them(document, folder, request, namespace, verbosity):
    if any("smollm2-semtoken" in block.text for block in BLOCKS[document]):
        request.getfixturevalue("reference")
    output = None
    for block in BLOCKS[document]:
        if block.language == "python":
            output = printed_by(block, namespace)
        elif block.language == "text" and block.follows and output is not None:
            assert lines_of(output) == lines_of(block.text), f"{document}:{block.line}"
            output = None


@pytest.mark.parametrize("document", [d for d, blocks in BLOCKS.items() if any(b.language == "bash" for b in blocks)])
def test_commands_of_shell_blocks_exist(document):
    training = {dashed(f"--{field.name}") for field in dataclasses.fields(TrainingArguments)}
    for command in (c for block in BLOCKS[document] if block.language == "bash" for c in commands(block)):
        command = command[next(i for i, word in enumerate(command) if not re.match(r"[A-Z_]+=", word)) :]
        words = ["python", *command[2:]] if command[:2] == ["accelerate", "launch"] else command
        if words[0] == "pip":
            extras = re.findall(r"\[([\w,-]+)\]", " ".join(words))
            assert all(extra in PROJECT["optional-dependencies"] for found in extras for extra in found.split(","))
        elif words[0] == "bash":
            assert (ROOT / words[1]).exists()
        elif words[0] not in FOREIGN:
            assert words[0] in ("semtoken", "python"), f"no test knows the program {words[0]!r}"
            text = help_of(*words[:2])
            assert "--help" in text, f"{words[:2]} has no help"
            known = options_in(text) | (training if "adapt" in words[1] else set())
            # What was measured before options had dashes is shown as it was typed.
            named = options_in(" ".join(words))
            assert {option if option in known else dashed(option) for option in named} <= known, command
