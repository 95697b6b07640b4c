"""A tiny checkpoint with a text, and what the tests of conversion and publishing make theirs from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conversion.conftest import encoder_folder, make_llama
from tests.fixtures.text import PROSE
from tests.fixtures.tiny import tiny_model, tiny_tokenizer
from tests.publishing.conftest import checkpoints, make_checkpoint

__all__ = ["checkpoints", "encoder_folder", "make_checkpoint", "make_llama"]


@pytest.fixture(scope="session")
def semtoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny SemToken checkpoint with a chat template."""
    folder = tmp_path_factory.mktemp("semtoken")
    tiny_model().save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}bot:"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of some two hundred tokens."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(PROSE[:400], encoding="utf-8")
    return file
