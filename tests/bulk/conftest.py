"""A tiny checkpoint, and documents in each form."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tokenizers import normalizers, processors

from semtoken_hf import SemTokenLlamaForCausalLM
from tests.fixtures.text import PROSE
from tests.fixtures.tiny import tiny_model, tiny_tokenizer

# A document each, by its id.
TEXTS = {f"part-{n}": PROSE[80 * n : 80 * n + 200] for n in range(5)}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bulk") / "checkpoint"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def stripping_checkpoint(checkpoint: Path, tmp_path: Path) -> Path:
    """Its tokenizer makes nothing of white space, which is then refused."""
    folder, tokenizer = shutil.copytree(checkpoint, tmp_path / "stripping"), tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> SemTokenLlamaForCausalLM:
    return SemTokenLlamaForCausalLM.from_pretrained(checkpoint).eval()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of texts, one of them deeper."""
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    for name, text in TEXTS.items():
        file = folder / ("deep" if name == "part-0" else "") / f"{name}.txt"
        file.write_text(text, encoding="utf-8")
    return folder
