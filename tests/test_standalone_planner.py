"""The planner without the language model, from checkpoints whose files do not fit each other or are damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from semtoken_hf import SpanPlanner
from tests.fixtures.text import PROSE
from tests.fixtures.tiny import BERT, tiny_model, tiny_tokenizer

ENCODERS: dict[str, dict[str, Any]] = {"static": {}, "bert": {"encoder_config": BERT, "encoder_window": 32}}


@pytest.fixture(scope="module", params=list(ENCODERS))
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(**ENCODERS[request.param]).save_pretrained(folder)
    return folder


def edit_json(path: Path, function: Callable[[dict], Any]) -> None:
    fields = json.loads(path.read_text())
    function(fields)
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("encoder_config", {"model_type": "semtoken_static", "hidden_size": size}) for size in (2**30, 2**62, "64")),
        *(("vocab_size", size) for size in (2**30, 2**62, -1)),
        ("encoder_config", {"model_type": "bert", "num_hidden_layers": 2**40}),
        ("encoder_config", {"model_type": "bert", "hidden_size": 2**20, "max_position_embeddings": 2**30}),
        ("bos_token_id", "1"),
        ("dtype", "no such dtype"),
    ],
)
def test_a_configuration_that_does_not_fit_the_weights(checkpoint, tmp_path, field: str, value: Any) -> None:
    """Refused before anything is as large as it says."""
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    edit_json(tmp_path / "config.json", lambda fields: fields.update({field: value}))
    with pytest.raises(ValueError, match=r"config\.json|encoder_config"):
        SpanPlanner.from_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.name_or_path = str(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json|encoder_config"):
        tokenizer(PROSE, return_span_ids=True)


@pytest.mark.parametrize("content", [b"[]", b"3", b"null"])
def test_a_configuration_that_is_none(checkpoint, tmp_path, content: bytes) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json of .* does not say how to plan"):
        SpanPlanner.from_pretrained(tmp_path)


@pytest.mark.parametrize("length", [0, 7, 8, 100, 5000])
def test_truncated_weights(checkpoint, tmp_path, length: int) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / SAFE_WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:length])
    with pytest.raises(OSError, match=rf"{SAFE_WEIGHTS_NAME}.* is damaged"):
        SpanPlanner.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[]", b"3", b"{}", b'{"weight_map": 3}', b'{"weight_map": []}']
)
def test_a_damaged_index(tmp_path, content: bytes) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="60KB")
    (tmp_path / SAFE_WEIGHTS_INDEX_NAME).write_bytes(content)
    with pytest.raises(OSError, match=f"{SAFE_WEIGHTS_INDEX_NAME} is damaged"):
        SpanPlanner.from_pretrained(tmp_path)


def test_another_encoder_in_the_weights(checkpoint, tmp_path) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / SAFE_WEIGHTS_NAME)
    name = next(name for name in tensors if "semantic_encoder." in name)
    tensors[name + "x"] = tensors.pop(name)
    save_file(tensors, tmp_path / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"does not fit its config\.json: .* and 1 more"):
        SpanPlanner.from_pretrained(tmp_path)
