import lzma

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from semtoken_hf.training.corpus import (
    BlockSampler,
    is_held_out,
    iter_training_text,
    read_documents,
    read_held_out,
    tokenize_file,
    weights_by_file,
)


def word_tokenizer():
    vocabulary = {"<s>": 0, "<unk>": 1, **{f"w{i}": i + 2 for i in range(200)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        ("one\ntwo\n\nthree\n", ["one\ntwo", "three"]),
        ("one\n\ntwo\n\n\nthree\n", ["one\n\ntwo", "three"]),
        ("\n\n", []),
    ],
)
def test_documents_are_split_at_the_widest_gap(tmp_path, text, documents):
    plain, packed = tmp_path / "a.txt", tmp_path / "a.txt.xz"
    plain.write_text(text)
    packed.write_bytes(lzma.compress(text.encode()))
    assert read_documents(plain) == read_documents(packed) == documents


def test_tokens_are_split_by_document_opened_by_bos_and_cached(tmp_path):
    documents = [f"w{i} w{i + 1} w{i + 2}" for i in range(150)]
    file = tmp_path / "a.txt"
    file.write_text("\n\n".join(documents))
    sides = tokenize_file(file, word_tokenizer(), tmp_path / "cache", 0.2, bos_id=0)
    assert sum(len(ids) for ids in sides.values()) == 4 * len(documents)
    held_out = [d for d in documents if is_held_out(d, 0.2)]
    assert sides["held_out"].reshape(-1, 4)[:, 1].tolist() == [int(d.split()[0][1:]) + 2 for d in held_out]
    assert (sides["train"].reshape(-1, 4)[:, 0] == 0).all()
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()}
    tokenize_file(file, word_tokenizer(), tmp_path / "cache", 0.2, bos_id=0)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()} == stamps


def test_sampler_weights_order_and_errors():
    streams = {"a": np.arange(0, 1000, dtype=np.uint32), "b": np.arange(5000, 6000, dtype=np.uint32)}
    sampler = BlockSampler(streams, 10, {"a": 2.5, "b": 0.5}, seed=3)
    blocks = [sampler[i] for i in range(len(sampler))]
    from_a = sum(block[0] < 1000 for block in blocks)
    assert from_a == 250
    assert len(blocks) - from_a == 50
    assert all((np.diff(block) == 1).all() for block in blocks)
    again = BlockSampler(streams, 10, {"a": 2.5, "b": 0.5}, seed=3)
    assert all((again[i] == blocks[i]).all() for i in range(len(blocks)))
    other = BlockSampler(streams, 10, {"a": 2.5, "b": 0.5}, seed=4)
    assert any((other[i] != blocks[i]).any() for i in range(len(blocks)))
    assert (sampler[len(sampler)] == blocks[0]).all()
    with pytest.raises(ValueError, match="unknown files"):
        BlockSampler(streams, 10, {"c": 1.0}, seed=0)
    with pytest.raises(ValueError, match="no file holds"):
        BlockSampler(streams, 2000, {}, seed=0)


def test_weights_name_files_with_or_without_their_suffix():
    files = ["a.md", "a.txt", "b.en.txt.xz", "c.txt"]
    assert weights_by_file({"b.en": 2.0, "a.txt": 0.5}, files) == {"b.en.txt.xz": 2.0, "a.txt": 0.5}
    for names, message in ((["d"], "no file; there are"), (["a"], r"\['a.md', 'a.txt'\]"), (["c", "c.txt"], "twice")):
        with pytest.raises(ValueError, match=message):
            weights_by_file(dict.fromkeys(names, 1.0), files)


def test_held_out_documents_are_those_that_training_leaves_out(tmp_path):
    documents = [f"document {i} of a small corpus" for i in range(60)]
    file = tmp_path / "a.txt"
    file.write_text("\n\n\n".join(documents))
    held_out = read_held_out(file, 0.3).split("\n\n\n")
    training = list(iter_training_text([file], 0.3))
    assert 5 < len(held_out) < 40
    assert sorted(held_out + training) == sorted(documents)
