"""A shard: the compressed documents of one safetensors file, and the one function that makes it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from ..conversion.encoder import quiet_loading
from ..conversion.staging import staged_file
from ..serving.prompt_embeds import export_prompt
from .settings import PREFIXES, WorkerSettings

FORMAT, VERSION = "semtoken_shard", 1
# The only entry of the metadata: safetensors writes several in an order of its own, and shards would differ.
KEY = "semtoken"
# Tensors of one document, `<place in the shard>.<name>`.
PREFIX_TENSORS = ("input_ids", "inputs_embeds", "position_ids", "slot_lengths")
PROMPT_TENSOR = "prompt_embeds"


def compress_rows(rows: dict[str, Any], settings: WorkerSettings) -> dict[str, Any]:
    """Compress shards and write each to its file; what every engine maps over the rows.

    Args:
        rows: a batch of shards: `shard`, their numbers; `file`, their names; `ids` and `texts`, of their documents.

    Returns:
        `shard`, the numbers.

    Raises:
        ValueError: a document cannot be compressed; the message names it.
    """
    for file, ids, texts in zip(rows["file"], rows["ids"], rows["texts"], strict=True):
        write_shard(Path(settings.folder) / str(file), [str(name) for name in ids], map(str, texts), settings)
    return {"shard": rows["shard"]}


def write_shard(path: Path, ids: list[str], texts: Any, settings: WorkerSettings) -> None:
    """Compress the documents of one shard and write them, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    documents = []
    for place, (name, text) in enumerate(zip(ids, texts, strict=True)):
        try:
            found, facts = compress_document(text, settings)
        except ValueError as error:
            raise ValueError(f"document '{name}': {error}") from error
        tensors |= {f"{place}.{key}": value.cpu().contiguous() for key, value in found.items()}
        documents.append({"id": name, **facts})
    header = {"format": FORMAT, "version": VERSION, "kind": settings.kind, "identity": settings.identity}
    content = save(tensors, {KEY: json.dumps({**header, "documents": documents})})
    with staged_file(path) as staged:
        staged.write_bytes(content)  # `save_file` calls a full disk a damaged file


def compress_document(text: str, settings: WorkerSettings) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of one document, and its tokens and slots."""
    model, tokenizer = load(settings.checkpoint, settings.revision, settings.kind, settings.dtype)
    ratio = settings.target_ratio
    if settings.kind == PREFIXES:
        prefix = model.compress_prefix(text, tokenizer, target_ratio=ratio)
        prompt = prefix.prompt
        tensors = {"input_ids": prefix.input_ids, "inputs_embeds": prompt.inputs_embeds}
        tensors |= {"position_ids": prompt.position_ids, "slot_lengths": prompt.slot_lengths}
        tokens, slots, met = prefix.original_length, prefix.compressed_length, bool(prompt.budget_met)
    else:
        exported = export_prompt(model, tokenizer, text, target_ratio=ratio)
        tensors = {PROMPT_TENSOR: exported.prompt_embeds}
        tokens, slots, met = exported.original_length, len(exported.prompt_embeds), exported.budget_met
    return tensors, {"tokens": tokens, "slots": slots, "budget_met": met}


@functools.lru_cache(1)
def load(checkpoint: str, revision: str | None, kind: str, dtype: str | None) -> tuple[Any, Any]:
    """What compression needs of a checkpoint, once a process: embeddings, encoder, merger and tokenizer, no layers."""
    auto = AutoModelForCausalLM if kind == PREFIXES else AutoModel
    options: dict[str, Any] = {"num_hidden_layers": 0, "adapter_subfolder": None, "dtype": dtype or "auto"}
    with quiet_loading(True):  # the layers that stay unread are no news
        model = auto.from_pretrained(checkpoint, revision=revision, **options).eval()
    if torch.cuda.is_available():
        model.to("cuda")
    return model, AutoTokenizer.from_pretrained(checkpoint, revision=revision)


def read_header(path: Path) -> dict[str, Any]:
    """What a shard says of itself: `kind`, `identity`, and `documents` with `id`, `tokens`, `slots`, `budget_met`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no shard, or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(KEY, "{}"))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it and run the same command again") from error
    if (header.get("format"), header.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"{path} is no shard of version {VERSION}: `semtoken compress-dataset` makes them")
    return header


def read_tensors(path: Path, place: int, kind: str) -> dict[str, Tensor]:
    """The tensors of document number `place` of a shard, copied."""
    names = PREFIX_TENSORS if kind == PREFIXES else (PROMPT_TENSOR,)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(f"{place}.{name}").clone() for name in names}


__all__ = ["compress_rows", "read_header", "read_tensors"]
