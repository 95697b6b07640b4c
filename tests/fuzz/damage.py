"""Damage to a saved checkpoint: one thing done to one of its files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"


def damage_file(folder: Path, part: tuple[Any, ...]) -> None:
    """Do one thing to one file."""
    what, name = part[0], part[1]
    path = folder / name
    if name == WEIGHTS and not path.exists():  # of several shards, one
        shards = sorted(folder.glob("model-*.safetensors"))
        path = shards[int(part[2] * len(shards)) if isinstance(part[2], float) else part[2] % len(shards)]
    if not path.exists():
        return
    if what in ("set", "set encoder", "drop"):
        fields = json.loads(path.read_text())
        if what == "set":
            fields[part[2]] = part[3]
        elif what == "set encoder":
            fields["encoder_config"] = {**fields["encoder_config"], part[2]: part[3]}
        else:
            del fields[sorted(fields)[part[2] % len(fields)]]
        path.write_text(json.dumps(fields))
    elif what in ("rename", "drop tensor", "other shape", "other dtype", "foreign", "nan", "scalar"):
        damage_tensor(path, what, part[2])
    elif what == "remove":
        path.unlink()
    else:
        path.write_bytes(damaged(path.read_bytes(), *part))


def damaged(content: bytes, what: str, name: str, place: float, byte: int) -> bytes:
    at = int(place * len(content))
    if what == "truncate":
        return content[:at]
    if what == "flip":
        return content[:at] + bytes([content[at] ^ byte]) + content[at + 1 :]
    if what == "flip header":
        at = int(place * (8 + struct.unpack("<Q", content[:8])[0]))
        return content[:at] + bytes([content[at] ^ byte]) + content[at + 1 :]
    if what == "long header":
        return struct.pack("<Q", (1 << (byte % 64)) - 1) + content[8:]
    others = {
        "empty": b"",
        "garbage": bytes((i * byte) % 256 for i in range(300)),
        "not an object": [b"[]", b"3", b'"x"', b"null", b"[[1]]"][byte % 5],
        "no map": b'{"metadata": {}}',
        "other map": [b'{"weight_map": []}', b'{"weight_map": {}}', b'{"weight_map": {"a": 3}}', b'{"weight_map": 3}'][
            byte % 4
        ],
        "paths": b'{"metadata": {}, "weight_map": {"model.embed_tokens.weight": "../../etc/passwd", '
        b'"model.semantic_encoder.encoder.embeddings.weight": "nowhere.safetensors"}}',
    }
    return others[what]


def damage_tensor(path: Path, what: str, number: int) -> None:
    tensors = load_file(path)
    name = sorted(tensors)[number % len(tensors)]
    tensor = tensors[name]
    if what in ("rename", "drop tensor"):
        del tensors[name]
    changes = {
        "rename": (name + "x", tensor),
        "other shape": (name, torch.zeros(3, 5)),
        "other dtype": (name, tensor.to([torch.float16, torch.int8, torch.bool, torch.float64][number % 4])),
        "foreign": ("foreign.semantic_encoder.weight" if number % 2 else "foreign", torch.zeros(4)),
        "nan": (name, tensor * torch.nan),
        "scalar": (name, torch.tensor(1.0)),
    }
    if what in changes:
        tensors[changes[what][0]] = changes[what][1]
    save_file(tensors, path, metadata={"format": "pt"})
