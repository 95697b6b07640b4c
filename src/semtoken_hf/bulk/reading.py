"""Compressed documents by their ids: for `model.join_prefixes`, or for an inference engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..prefix_semtoken import CompressedPrefix, check_identity, identity_of, prompt_of_slots
from ..serving.prompt_embeds import ExportedPrompt
from .manifest import missing_shards, read_manifest
from .settings import PREFIXES, PROMPT_EMBEDS
from .shards import read_header, read_tensors


class CompressedDocuments(Mapping[str, Any]):
    """`CompressedPrefix`es, or `ExportedPrompt`s, by document id; each is read from its file when it is asked for.

    Args:
        places: shard and place in it, by document id.
        model: that reads the prefixes; None for prompt embeddings.
    """

    def __init__(self, places: dict[str, tuple[Path, int]], model: Any = None):
        self.places, self.model = places, model

    def __getitem__(self, name: str) -> Any:
        path, place = self.places[name]
        if self.model is None:
            facts = read_header(path)["documents"][place]
            embeds = read_tensors(path, place, PROMPT_EMBEDS)["prompt_embeds"]
            return ExportedPrompt(embeds, facts["tokens"], facts["budget_met"])
        device = self.model.get_input_embeddings().weight.device
        tensors = read_tensors(path, place, PREFIXES)
        if device.type != "meta":
            tensors = {key: value.to(device) for key, value in tensors.items()}
        slots = prompt_of_slots(tensors["inputs_embeds"], tensors["position_ids"], tensors["slot_lengths"])
        # Joined alone, so that it is of the model's own class, which remote code may have defined a second time.
        return self.model.join_prefixes([CompressedPrefix(self.model, tensors["input_ids"], slots)])

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def read_shard(path: str | Path, model: Any = None) -> CompressedDocuments:
    """The documents of one file.

    Args:
        model: that reads the prefixes; prompt embeddings need none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no shard, prefixes without a model, or with another model than theirs: the message names what
            differs.
    """
    path = Path(path)
    header = read_header(path)
    is_of_prefixes = header["kind"] == PREFIXES
    if is_of_prefixes:
        if model is None:
            raise ValueError(f"{path} holds prefixes: pass the `model` that reads them")
        check_identity(path, header["identity"], identity_of(model))
    places = {document["id"]: (path, place) for place, document in enumerate(header["documents"])}
    return CompressedDocuments(places, model if is_of_prefixes else None)


def open_prefixes(folder: str | Path, model: Any) -> CompressedDocuments:
    """The prefixes of all documents that `semtoken compress-dataset` has written to a folder.

    Raises:
        FileNotFoundError: the folder has no manifest.
        ValueError: it is unfinished, it holds prompt embeddings, or the model is not the one that reads its prefixes.
    """
    folder = Path(folder)
    places = _find_documents(folder, PREFIXES)
    check_identity(folder, read_manifest(folder)["identity"], identity_of(model))
    return CompressedDocuments(places, model)


def open_prompt_embeds(folder: str | Path) -> CompressedDocuments:
    """The prompt embeddings of all documents that `semtoken compress-dataset` has written to a folder.

    Raises:
        FileNotFoundError: the folder has no manifest.
        ValueError: it is unfinished, or it holds prefixes.
    """
    return CompressedDocuments(_find_documents(Path(folder), PROMPT_EMBEDS))


def _find_documents(folder: Path, kind: str) -> dict[str, tuple[Path, int]]:
    manifest = read_manifest(folder)
    if (found := manifest["options"]["kind"]) != kind:
        function = "open_prefixes" if found == PREFIXES else "open_prompt_embeds"
        raise ValueError(f"{folder} holds {found}, not {kind}: use `{function}`")
    if missing := missing_shards(folder, manifest):
        total = len(manifest["shards"])
        raise ValueError(f"{folder} lacks {len(missing)} of {total} shards: run the same `semtoken` command again")
    return {
        name: (folder / shard["file"], place)
        for shard in manifest["shards"]
        for place, name in enumerate(shard["documents"])
    }


__all__ = ["CompressedDocuments", "open_prefixes", "open_prompt_embeds", "read_shard"]
