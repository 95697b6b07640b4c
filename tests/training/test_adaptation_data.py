"""Batches of an adaptation: drawn by their index alone, in the ranges that were asked for."""

import json
import math

import numpy as np
import pytest
import torch

from semtoken_hf.training.adaptation_data import (
    BatchShape,
    ContextCollator,
    TextBlocks,
    export_dataset,
    is_of_share,
    load_blocks,
)
from semtoken_hf.training.corpus import BlockSampler, read_documents
from tests.fixtures.tiny import tiny_tokenizer

SHAPE = {
    "context_length": 40,
    "min_context_length": 24,
    "target_length": 8,
    "ratios": (1.5, 6.0),
    "uncompressed_share": 0.25,
    "batch_size": 2,
    "seed": 3,
}
BOS = 1


def text_blocks(limit=1000):
    sampler = BlockSampler({"a": np.arange(10, 2010, dtype=np.uint32)}, 48, {}, seed=0)
    return TextBlocks(sampler, BOS, limit)


def batches(count=400, start=0, **fields):
    shape = BatchShape(**{**SHAPE, **fields})
    data, collate = text_blocks(), ContextCollator(shape)
    size = shape.batch_size
    return [collate([data[i * size + row] for row in range(size)]) for i in range(start, start + count)]


def test_blocks_are_opened_by_bos_and_leave_the_text_alone():
    data = text_blocks(limit=70)
    assert len(data) == 70
    before = data.sampler[5].copy()
    block = data[5]
    assert block["index"] == 5
    assert block["input_ids"].dtype == torch.int64
    assert block["input_ids"][0] == BOS
    assert block["input_ids"][1:].tolist() == before[1:].tolist()
    assert (data.sampler[5] == before).all()


def test_batches_follow_from_their_index_alone():
    whole, resumed = batches(20), batches(10, start=10)
    for ours, theirs in zip(resumed, whole[10:], strict=True):
        assert torch.equal(ours.pop("input_ids"), theirs.pop("input_ids"))
        assert ours == theirs
    assert [b["target_ratio"] for b in batches(20, seed=4)] != [b["target_ratio"] for b in batches(20)]


def test_ranges():
    drawn = batches()
    lengths = {b["input_ids"].shape[1] - 8 for b in drawn}
    assert lengths == set(range(24, 41))
    assert all(b["input_ids"].shape[0] == 2 and b["target_length"] == 8 for b in drawn)
    ratios = sorted(b["target_ratio"] for b in drawn)
    assert 1.5 <= ratios[0] < 1.55
    assert 5.8 < ratios[-1] <= 6.0
    # Log-uniform: the median is the geometric mean.
    assert ratios[len(ratios) // 2] == pytest.approx(math.sqrt(1.5 * 6.0), rel=0.15)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.1, 10), (0.25, 25), (0.75, 75)])
def test_the_uncompressed_share_is_exact(share, expected):
    flags = [not b["compression"] for b in batches(100, uncompressed_share=share)]
    assert sum(flags) == expected
    assert flags == [is_of_share(i, share) for i in range(100)]
    if share == 0.25:
        assert flags == [i % 4 == 3 for i in range(100)]


def text_folder(tmp_path, documents=24):
    (tmp_path / "text").mkdir()
    for name in ("a.txt", "b.txt"):
        prose = [" ".join(f"{name}{i}n{j}" for j in range(40)) for i in range(documents)]
        (tmp_path / "text" / name).write_text("\n\n\n".join(prose))
    return tmp_path / "text"


def test_load_blocks(tmp_path):
    folder, tokenizer = text_folder(tmp_path), tiny_tokenizer()
    arguments = (folder, tokenizer, tmp_path / "cache", 64, {"a.txt": 2.0}, 0.3, 0)
    sampler, held_out = load_blocks(*arguments)
    assert set(sampler.names) == {"a.txt", "b.txt"}
    counts = np.bincount(sampler.order[:, 0])
    assert counts[0] > 1.5 * counts[1]
    assert held_out.dtype == torch.int64
    assert held_out.shape[1] == 64
    assert (held_out[:, 0] == tokenizer.bos_token_id).all()
    again, same = load_blocks(*arguments)
    assert torch.equal(held_out, same)
    assert (again.order == sampler.order).all()
    trained = {tuple(sampler[i][1:].tolist()) for i in range(len(sampler))}
    assert not trained & {tuple(row[1:].tolist()) for row in held_out}


def test_load_blocks_says_what_is_missing(tmp_path):
    folder, tokenizer = text_folder(tmp_path), tiny_tokenizer()
    with pytest.raises(ValueError, match=r"held-out .*64 tokens.*--held-out-share"):
        load_blocks(folder, tokenizer, tmp_path / "cache", 64, {}, 0.0, 0)
    with pytest.raises(ValueError, match="shorten the blocks"):
        load_blocks(folder, tokenizer, tmp_path / "cache", 10**6, {}, 0.3, 0)
    with pytest.raises(FileNotFoundError, match="no text files"):
        load_blocks(tmp_path / "nothing", tokenizer, tmp_path / "cache", 64, {}, 0.3, 0)


DOCUMENTS = ["one\ntwo", "\n\nthree\n\nfour\n", "five\n\n\nsix", "seven\n\n\n\n\n\neight", "nine"]


@pytest.fixture
def data_set(tmp_path, monkeypatch):
    """A data set of five documents in a local folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    lines = [json.dumps({"text": d, "title": f"t{i}"}) for i, d in enumerate(DOCUMENTS)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


def test_export_dataset(tmp_path, data_set):
    folder = export_dataset(data_set, None, "train", "text", tmp_path / "out", 4)
    (file,) = folder.iterdir()
    # One document stays one, whatever blank lines it has.
    assert read_documents(file) == ["one\ntwo", "three\n\nfour", "five\n\nsix", "seven\n\neight"]
    stamp = file.stat().st_mtime_ns
    assert export_dataset(data_set, None, "train", "text", tmp_path / "out", 4) == folder
    assert file.stat().st_mtime_ns == stamp
    titles = export_dataset(data_set, None, "train", "title", tmp_path / "out", 4)
    assert titles != folder
    assert read_documents(titles / file.name) == ["t0", "t1", "t2", "t3"]


def test_export_dataset_names_the_columns(tmp_path, data_set):
    with pytest.raises(ValueError, match=r"\['text', 'title'\], not 'body'.*--text-column"):
        export_dataset(data_set, None, "train", "body", tmp_path / "out", 4)
    assert not list((tmp_path / "out").rglob("*.txt"))
