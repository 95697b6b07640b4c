"""What the documents name, made real: folders and files in the working directory, and repositories on the loopback Hub.

Each is tiny and of the kind that its name says; a thing is made when a block that names it is about to run.
"""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertModel, BertTokenizerFast, PreTrainedTokenizerFast

import semtoken_hf
from tests.conversion.checkpoints import word_tokenizer
from tests.conversion.gguf_files import write_gguf
from tests.fixtures.children import ROOT
from tests.fixtures.evaluation_data import EMBEDDED, write_data
from tests.fixtures.reference import reference_folder
from tests.fixtures.tiny import plain_config, tiny_config
from tests.hub.hub_server import HubServer
from tests.hub.repositories import Repository, etag, is_lfs

CHAPTER = (ROOT / "scripts" / "quickstart_chapter.txt").read_text(encoding="utf-8")
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
# Of the vocabulary of the checkpoint that ships.
SIZES = {"vocab_size": 8192, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "max_position_embeddings": 2048}


def plain_checkpoint(folder: Path, family: str = "llama", safe: bool = True) -> None:
    """A tiny plain model of a family with a real tokenizer and a chat template."""
    torch.manual_seed(0)
    config = plain_config(tiny_config(family, **SIZES))
    model = semtoken_hf.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    if not safe:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    PreTrainedTokenizerFast.from_pretrained(EMBEDDED, chat_template=TEMPLATE).save_pretrained(folder)


def encoder(folder: Path) -> None:
    """A random BERT that spells words letter by letter."""
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"-()")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in letters)]
    BertTokenizerFast(vocab={piece: i for i, piece in enumerate(pieces)}, do_lower_case=True).save_pretrained(folder)
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(pieces), max_position_embeddings=256, **sizes)).save_pretrained(folder)


def converted_checkpoint(folder: Path) -> None:
    """The tiny plain Llama with the tiny encoder."""
    plain_checkpoint(folder.parent / f"{folder.name}-plain")
    encoder(folder.parent / f"{folder.name}-encoder")
    parts = (folder.parent / f"{folder.name}-{part}" for part in ("plain", "encoder"))
    semtoken_hf.convert_checkpoint(*parts, folder, progress=False)


def corpus(folder: Path) -> None:
    """Documents long enough to be held out whole."""
    folder.mkdir()
    parts = [CHAPTER.replace("Warburton", f"Warburton{i}") * 2 for i in range(6)]
    (folder / "novels.txt").write_text("\n\n\n".join(re.sub(r"\n{3,}", "\n\n", part) for part in parts))


def text(file: Path) -> None:
    file.write_text(CHAPTER, encoding="utf-8")


def gguf_file(file: Path) -> None:
    """A tiny Llama as GGUF; a row of the vocabulary for every token, and rows of whole blocks of Q8_0."""
    tokenizer = word_tokenizer(["the", "chapter"])
    sizes = {"vocab_size": len(tokenizer), "intermediate_size": 64, "tie_word_embeddings": True}
    write_gguf(file, semtoken_hf.AutoModelForCausalLM.from_config(plain_config(tiny_config(**sizes))), tokenizer)


def gguf_folder(folder: Path) -> None:
    folder.mkdir()
    for name in ("tiny.Q8_0.gguf", "tiny.Q4_0.gguf"):
        gguf_file(folder / name)


def lora(folder: Path) -> None:
    """An adapter of a tiny Llama beside it."""
    base = folder.parent / f"{folder.name}-base"
    plain_checkpoint(base)
    model = semtoken_hf.AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(folder)


def reference(folder: Path) -> None:
    """The real model, which is too large to copy."""
    folder.symlink_to(reference_folder())


FAMILIES = {
    "meta-llama/Llama-3.2-1B": "llama",
    "mistralai/Mistral-7B-v0.3": "mistral",
    "Qwen/Qwen3-0.6B": "qwen3",
    "EleutherAI/pythia-160m": "gpt_neox",
}
# In the working directory.
LOCAL: dict[str, Callable[[Path], Any]] = {
    "llama-3.2-1b-semtoken": converted_checkpoint,
    "my-semtoken": converted_checkpoint,
    "smollm2-semtoken": reference,
    "SmolLM2-135M-Instruct.Q4_1.gguf": gguf_file,
    "gguf-folder": gguf_folder,
    "my-lora": lora,
    "my-llama": plain_checkpoint,
    "runs/reference/model": plain_checkpoint,
    "my-old-llama": functools.partial(plain_checkpoint, safe=False),
    "corpus": corpus,
    "data": write_data,
    **dict.fromkeys(["long.txt", "document.txt", "chapter.txt", "report.txt"], text),
}
# On the Hub.
REMOTE: dict[str, Callable[[Path], Any]] = {
    "sentence-transformers/all-MiniLM-L6-v2": encoder,
    "me/llama-3.2-1b-semtoken": converted_checkpoint,
    **{name: functools.partial(plain_checkpoint, family=family) for name, family in FAMILIES.items()},
}


def names_in(words: str, known: Any) -> list[str]:
    """Which of the known names stand in a text, each as a whole path."""
    return [name for name in known if re.search(rf"(?<![\w./-]){re.escape(name)}(?![\w-]|\.\w)", words)]


class NamedThings:
    """Makes each thing once and gives every document a copy.

    Args:
        store: folder for what is made.
    """

    def __init__(self, store: Path):
        self.store = store

    def _made(self, make: Any) -> Path:
        # The same function makes the same thing, whatever it is called.
        is_partial = isinstance(make, functools.partial)
        key = f"{make.func.__name__}-{sorted(make.keywords.items())}" if is_partial else make.__name__
        path = self.store / key / ("file.gguf" if make is gguf_file else "file" if make is text else "folder")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            make(path)
        return path

    def prepare(self, words: str, folder: Path, hub: HubServer, created: set[str]) -> None:
        """Make what `words` name, in `folder` and on `hub`, but for what the block itself creates."""
        for name in names_in(words, LOCAL):
            target = folder / name
            if name not in created and not target.exists():
                made = self._made(LOCAL[name])
                target.parent.mkdir(parents=True, exist_ok=True)
                if made.is_symlink():
                    target.symlink_to(made.resolve())
                else:
                    (shutil.copytree if made.is_dir() else shutil.copy)(made, target)
        for name in names_in(words, REMOTE):
            if name not in created and name not in hub.repositories:
                made = self._made(REMOTE[name])
                files = {str(f.relative_to(made)): f.read_bytes() for f in made.rglob("*") if f.is_file()}
                hub.repositories[name] = Repository(name, private=False)
                hub.repositories[name].add_commit("main", "weights", files)
                hub.objects |= {etag(path, content): content for path, content in files.items() if is_lfs(path)}
            if name in hub.repositories:  # a commit that somebody has pinned
                commits = re.findall(r"revision[=\s]+[\"']?([\w.-]+)", words)
                hub.repositories[name].tags |= dict.fromkeys(commits, hub.repositories[name].resolve("main").sha)


def working_directory(folder: Path) -> Path:
    """A folder that looks like a clone: links to the repository's own files, and copies of its checkpoints.

    The checkpoint that ships gets a chat template, which it lacks and which documents about chats need.
    """
    folder.mkdir()
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("model_cards", "runs"):
            (folder / path.name).symlink_to(path)
    for path in (ROOT / "model_cards").iterdir():
        target = folder / "model_cards" / path.name
        target.parent.mkdir(exist_ok=True)
        if not (path / "config.json").exists():
            target.symlink_to(path)
            continue
        target.mkdir()
        for file in path.iterdir():
            # No links: a whole checkpoint has none.
            (shutil.copytree if file.is_dir() else shutil.copy)(file, target / file.name)
        (target / "chat_template.jinja").write_text(TEMPLATE)
    return folder
