"""Every code block of every document is run, and what a block claims to be printed is printed."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess

import pytest

from tests.docs.blocks import Block, documents, read_blocks
from tests.docs.not_run import why_line_is_not_run
from tests.docs.reader import UnknownBlock, assert_same
from tests.docs.shell import logical_lines
from tests.fixtures.children import ROOT


@pytest.mark.parametrize("document", [d for d in documents() if read_blocks(d)])
def test_the_blocks_of_a_document_run(document, reader):
    for block in read_blocks(document):
        try:
            reader.run(block)
        except Exception as error:
            error.add_note(f"in the block at {block.place}")
            raise


def block(text, language="bash", document="docs/some.md"):
    return Block(document, 1, language, text)


def test_a_block_that_nobody_runs_fails(reader):
    for language in ("json", "", "yaml", "text"):
        with pytest.raises(UnknownBlock):
            reader.run(block("{}\n", language))
    # What a block prints stands right behind it.
    reader.run(block("print({})\n", "python"))
    with pytest.raises(UnknownBlock):
        reader.run(dataclasses.replace(block("{}\n", "text"), follows=False))
    with pytest.raises(AssertionError, match="no test knows the program 'ollama'"):
        reader.run(block("ollama serve\n"))


def test_what_does_not_run_fails(reader):
    with pytest.raises(AssertionError, match="exit code"):
        reader.run(block("semtoken no-such-command\n"))
    with pytest.raises(NameError):
        reader.run(block("no_such_name\n", "python"))
    with pytest.raises(AssertionError, match="no extra 'gpus'"):
        reader.run(block("pip install -e '.[gpus]'\n"))
    with pytest.raises(AssertionError, match="has no option --nope"):
        reader.run(block("python scripts/measure_similarity.py --nope 3\n"))


def test_another_output_fails(reader):
    reader.run(block("print('one  ')\nprint(2)\n", "python"))
    assert_same(block("one\n2\n", "text"), reader.output)
    with pytest.raises(AssertionError, match="prints something else"):
        reader.run(block("one\n3\n", "text"))


def test_a_pinned_commit_is_there(reader):
    load = 'from transformers import AutoConfig\nAutoConfig.from_pretrained("me/llama-3.2-1b-semtoken", {})\n'
    reader.run(block(load.format(f'revision="{"a" * 40}", trust_remote_code=True'), "python"))
    with pytest.raises(OSError, match="revision"):
        reader.run(block(load.format('**{"revision": "b" * 40}'), "python"))


def test_digests_are_those_of_the_files(reader):
    digest = hashlib.sha256((ROOT / "docs" / "inspect.png").read_bytes()).hexdigest()
    reader.run(block(f"{digest}  inspect.png\n", "text"))
    with pytest.raises(subprocess.CalledProcessError):
        reader.run(block(f"{digest[::-1]}  inspect.png\n", "text"))


def test_blocks_of_a_document_share_their_names(reader):
    reader.run(block("x = 3\n", "python"))
    reader.run(block("assert x == 3\n", "python"))


def test_a_block_is_found_with_its_line():
    text = "# Title\n\n```python\nx = 1\n```\n\n- item\n\n  ```bash\n  ls \\\n    docs\n  ```\n"
    found = read_blocks("docs/some.md", text)
    assert [(b.language, b.line, b.text) for b in found] == [("python", 4, "x = 1\n"), ("bash", 10, "ls \\\n  docs\n")]
    assert [b.follows for b in read_blocks("d.md", f"{text}\n```text\n1\n```\n")] == [False, False, True]
    with pytest.raises(ValueError, match="not closed"):
        read_blocks("docs/some.md", "```python\n")


def test_lines_go_on_behind_a_backslash_or_a_pipe():
    assert logical_lines("# comment\na \\\n  b # c\n\nd |\n  e\n") == ["a   b # c", "d |   e"]


def test_long_runs_alone_are_left_out():
    assert why_line_is_not_run("semtoken evaluate --checkpoint c --data-dir d") is not None
    assert why_line_is_not_run("semtoken evaluate --checkpoint c --data-dir d --fraction 0.02") is None
    assert why_line_is_not_run("semtoken adapt --checkpoint c --text t") is None
