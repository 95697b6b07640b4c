"""A place where the documents' Python blocks can run: real things under the names that the documents use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertModel, BertTokenizerFast, PreTrainedTokenizerFast

import semtoken_hf
from semtoken_hf.training.adaptation import adapt
from tests.fixtures.children import ROOT
from tests.fixtures.evaluation_data import EMBEDDED
from tests.fixtures.reference import reference_folder
from tests.fixtures.tiny import plain_config, tiny_config
from tests.training.adaptation_runs import make_inputs, options

CHAPTER = (ROOT / "scripts" / "quickstart_chapter.txt").read_text(encoding="utf-8")
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
# Of the vocabulary of the checkpoint that ships.
SIZES = {"vocab_size": 8192, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "max_position_embeddings": 2048}


def write_plain(folder: Path) -> Path:
    """A tiny plain Llama with a real tokenizer and a chat template."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(plain_config(tiny_config(**SIZES))).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(EMBEDDED, chat_template=TEMPLATE).save_pretrained(folder)
    return folder


def write_encoder(folder: Path) -> Path:
    """A random BERT that spells words letter by letter."""
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"-()")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in letters)]
    BertTokenizerFast(vocab={piece: i for i, piece in enumerate(pieces)}, do_lower_case=True).save_pretrained(folder)
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(pieces), max_position_embeddings=256, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a clone in which somebody has converted and adapted a tiny Llama."""
    folder, inputs = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("inputs")
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name != "runs":
            (folder / path.name).symlink_to(path)
    plain = write_plain(folder / "meta-llama" / "Llama-3.2-1B")
    semtoken_hf.convert_checkpoint(plain, write_encoder(inputs / "bert"), folder / "my-semtoken", progress=False)
    (folder / "llama-3.2-1b-semtoken").symlink_to("my-semtoken")
    make_inputs(inputs)
    adapt(*options(inputs, folder / "runs" / "adapt", {"trainable": "lora", "evaluation_windows": 1}, max_steps=1))
    return folder


@pytest.fixture
def folder(clone: Path, monkeypatch: pytest.MonkeyPatch, remote_modules: Path) -> Path:
    """The working directory."""
    monkeypatch.chdir(clone)
    return clone


@pytest.fixture
def reference(folder: Path) -> None:
    """The real model, under the name that the documents give it."""
    if not (folder / "smollm2-semtoken").exists():
        (folder / "smollm2-semtoken").symlink_to(reference_folder())


@pytest.fixture
def namespace() -> dict[str, Any]:
    """What the documents' Python blocks take as given."""
    half = len(CHAPTER) // 2
    return {
        "long_prompt": CHAPTER,
        "question": "\nQuestion: Who has written the book that Sherwood reads?\nAnswer:",
        "messages": [
            {"role": "system", "content": "You answer from the chapter."},
            {"role": "user", "content": CHAPTER[:half]},
            {"role": "assistant", "content": "I have read it."},
            {"role": "user", "content": "Who has written the book that Sherwood reads?"},
        ],
    }
