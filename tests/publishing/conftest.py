from __future__ import annotations

import shutil

import pytest

from tests.fixtures.adapted import adapted_model
from tests.fixtures.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Saved once: one in a file, one in shards, one with an adapter."""
    root = tmp_path_factory.mktemp("checkpoints")
    tiny_model().save_pretrained(root / "single")
    tiny_model(seed=1).save_pretrained(root / "sharded", max_shard_size="60KB")
    adapted_model().save_pretrained(root / "adapted")
    for folder in root.iterdir():
        tiny_tokenizer().save_pretrained(folder)
    return root


@pytest.fixture
def make_checkpoint(checkpoints, tmp_path):
    """A function that copies one of `checkpoints` to a folder that the test may change."""

    def make(kind="single", name="tiny-semtoken"):
        return shutil.copytree(checkpoints / kind, tmp_path / name)

    return make
