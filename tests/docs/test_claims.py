"""What documents say outside their code blocks and that a machine can check: options, messages, the drawing."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import runpy

import pytest
from transformers import TrainingArguments

from semtoken_hf.evaluation.option_names import dashed
from tests.docs.blocks import documents, help_of, options_in
from tests.docs.test_links import FENCED
from tests.fixtures.children import ROOT

# Of other programs, where documents name them.
FOREIGN = {
    "--ignore-missing": "sha256sum",
    "--model": "lm_eval",
    "--attn-implementation": "transformers serve",
    "--chat-template-kwargs": "transformers serve",
    "--compile": "transformers serve",
    "--continuous-batching": "transformers serve",
    "--dtype": "transformers serve",
    "--trust-remote-code": "transformers serve",
    "--api-server-count": "vllm serve",
    "--chat-template": "vllm serve",
    "--default-chat-template-kwargs": "vllm serve",
    "--reasoning-parser": "vllm serve",
}
COMMANDS = ("convert", "adapt", "generate", "inspect", "doctor", "evaluate", "benchmark", "push", "export", "serve")
COMMANDS += ("compress-dataset",)
SCRIPTS = ("export_prompt_embeds.py", "fuzz.py", "gpu_suite.py", "measure_million_tokens.py")


def prose(document: str) -> str:
    """A document without its blocks, and without the commands of past measurements."""
    text = FENCED.sub("", (ROOT / document).read_text(encoding="utf-8"))
    return re.sub(r"^- command: .*", "", text, flags=re.MULTILINE)


def test_every_option_that_is_named_exists():
    known = set(FOREIGN) | {dashed(f"--{field.name}") for field in dataclasses.fields(TrainingArguments)}
    for words in [["semtoken", name] for name in COMMANDS] + [["python", f"scripts/{name}"] for name in SCRIPTS]:
        known |= options_in(help_of(*words))
    for document in documents():
        # The evaluation's own report names the options of its configuration.
        if not document.startswith("model_cards"):
            named = options_in(" ".join(re.findall(r"`([^`]+)`", prose(document))))
            assert sorted(named - known) == [], document


def messages_of_the_package() -> str:
    """Every string of the package's sources, with a space for what is filled in, without quotes."""
    texts = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else " " for part in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return re.sub(r"[`'\"]", "", "\n".join(texts))


def quoted_messages(document: str) -> list[str]:
    """First cells of the tables that are headed `message` or `warning`."""
    found, inside = [], False
    for line in prose(document).splitlines():
        cell = line.split("|")[1].strip() if line.startswith("|") else ""
        if cell in ("message", "warning"):
            inside = True
        elif not cell:
            inside = False
        elif inside and not cell.startswith("---"):
            found += re.findall(r"`([^`]+)`", cell)
    return found


@pytest.mark.parametrize("document", ["docs/converting.md", "docs/limits.md"])
def test_every_message_that_is_quoted_is_said(document):
    said, quoted = messages_of_the_package(), quoted_messages(document)
    assert len(quoted) > 6
    for message in quoted:
        for part in re.split(r"\.\.\.", re.sub(r"['\"]", "", message)):
            words = part.strip(" ()[];:,")
            assert words in said, f"{document} quotes {message!r}, but nothing says {words!r}"


def test_tables_of_quality_say_what_the_card_s_figures_say():
    run = runpy.run_path(str(ROOT / "scripts" / "quality_tables.py"))
    cells = json.loads(run["METRICS"].read_text(encoding="utf-8"))["cells"]
    for document in run["DOCUMENTS"]:
        text = (ROOT / document).read_text(encoding="utf-8")
        assert run["TABLE"].search(text), document
        assert run["filled"](text, cells) == text, f"{document}: run scripts/quality_tables.py"
