"""`semtoken compress-dataset`: every document as the model compresses it; a run that was stopped goes on."""

from __future__ import annotations

import json
import os
import signal
import time

import datasets
import pytest
import torch

from semtoken_hf.bulk import BulkOptions, compress_dataset, open_prefixes, open_prompt_embeds, read_shard, shards
from semtoken_hf.serving.prompt_embeds import export_prompt
from tests.bulk.conftest import TEXTS
from tests.fixtures.command_line import end_of, run_command, run_json, start_command
from tests.fixtures.evaluation_data import write_rows
from tests.fixtures.tiny import tiny_model, tiny_tokenizer

ROWS = [{"id": name, "body": text} for name, text in TEXTS.items()]


def assert_same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        for name in ("inputs_embeds", "position_ids", "slot_lengths"):
            assert torch.equal(getattr(one.prompt, name), getattr(other.prompt, name))


def test_prefixes_are_those_of_the_model(checkpoint, model, source, tmp_path):
    out = tmp_path / "out"
    command = ("compress-dataset", checkpoint, source, out, "--shard-size", 2, "--target-ratio", 3, "--quiet")
    record = run_json(*command)
    found, tokenizer = open_prefixes(out, model), tiny_tokenizer()
    assert list(found) == ["deep/part-0.txt", *(f"part-{n}.txt" for n in range(1, 5))]
    wanted = [model.compress_prefix(text, tokenizer, target_ratio=3) for text in TEXTS.values()]
    assert_same(found.values(), wanted)
    counts = {"shards": 3, "documents": 5, "written": 3, "kind": "prefixes", "folder": str(out)}
    counts |= {"tokens": sum(p.original_length for p in wanted), "slots": sum(p.compressed_length for p in wanted)}
    assert record == counts
    assert counts["slots"] < counts["tokens"]
    assert files_of(out) == {".lock", "manifest.json", *(f"shard-0000{n}.safetensors" for n in range(3))}
    assert "5 documents in 3 shards, 0 of them new" in run_command(*command).stdout


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_killed_workers_lose_nothing(checkpoint, model, tmp_path):
    texts = [f"{n} {TEXTS['part-1']}" for n in range(300)]
    file, out = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in texts]), tmp_path / "out"
    command = ("compress-dataset", checkpoint, file, out, "--shard-size", 1, "--quiet")
    child = start_command(*command, "--workers", 2)
    while not list(out.glob("shard-*.safetensors")):
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.01)
    child.kill()
    assert end_of(child)[0] == -signal.SIGKILL
    assert 0 < run_json(*command)["written"] < 300
    assert files_of(out) == {".lock", "manifest.json", *(f"shard-{n:05}.safetensors" for n in range(300))}
    found, tokenizer = open_prefixes(out, model), tiny_tokenizer()
    assert_same((found[str(n)] for n in range(4)), (model.compress_prefix(text, tokenizer) for text in texts[:4]))


def test_joined_prefixes_are_read(checkpoint, model, source, tmp_path):
    compress_dataset(BulkOptions(str(checkpoint), str(source)), tmp_path / "out", progress=False)
    found, tokenizer = read_shard(tmp_path / "out" / "shard-00000.safetensors", model), tiny_tokenizer()
    names = ["part-3.txt", "part-1.txt"]
    answers = [
        model.generate(**model.join_prefixes(prefixes).inputs("the cat", tokenizer), max_new_tokens=8)
        for prefixes in (
            [found[name] for name in names],
            [model.compress_prefix(TEXTS[name.removesuffix(".txt")], tokenizer) for name in names],
        )
    ]
    assert torch.equal(*answers)


def test_prompt_embeds_of_rows(checkpoint, model, tmp_path):
    file, out = write_rows(tmp_path / "rows.jsonl.xz", ROWS), tmp_path / "out"
    options = ("--text-field", "body", "--kind", "prompt-embeds", "--quiet")
    run_json("compress-dataset", checkpoint, file, out, *options)
    found = open_prompt_embeds(out)
    assert list(found) == list(TEXTS)
    wanted = export_prompt(model, tiny_tokenizer(), TEXTS["part-2"])
    assert torch.equal(found["part-2"].prompt_embeds, wanted.prompt_embeds)
    assert found["part-2"].original_length == wanted.original_length
    with pytest.raises(ValueError, match="holds prompt-embeds, not prefixes: use `open_prompt_embeds`"):
        open_prefixes(out, model)


def test_a_saved_data_set(checkpoint, model, tmp_path):
    folder = tmp_path / "data"
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": [*TEXTS.values()]})}).save_to_disk(folder)
    compress_dataset(BulkOptions(str(checkpoint), str(folder)), tmp_path / "out", progress=False)
    assert list(open_prefixes(tmp_path / "out", model)) == list("01234")
    options = BulkOptions(str(checkpoint), str(folder), text_split="test")
    with pytest.raises(ValueError, match=r"has the splits \['train'\], not 'test': pass --text-split"):
        compress_dataset(options, tmp_path / "other", progress=False)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_only_the_rest_is_compressed(checkpoint, model, source, tmp_path, monkeypatch, number, code):
    out, write, written = tmp_path / "out", shards.write_shard, []

    def write_and_signal(path, *rest):
        write(path, *rest)
        written.append(path.name)
        if len(written) == 2:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(shards, "write_shard", write_and_signal)
    command = ("compress-dataset", checkpoint, source, out, "--shard-size", 1, "--quiet")
    assert "start the same command again to go on" in run_command(*command, code=code).stderr
    with pytest.raises(ValueError, match="lacks 3 of 5 shards: run the same"):
        open_prefixes(out, model)
    assert run_json(*command)["written"] == 3
    assert sorted(written) == [f"shard-0000{n}.safetensors" for n in range(5)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--target-ratio", "4"], "with --target-ratio None, and now it is 4.0"),
        (["--kind", "prompt-embeds"], "with --kind prefixes, and now it is prompt-embeds"),
        (["--shard-size", "3"], "with --shard-size 64, and now it is 3"),
        ("document", "other documents than"),
        ("checkpoint", "with another checkpoint"),
    ],
)
def test_another_run_is_refused_by_name(checkpoint, source, tmp_path, change, message):
    out = tmp_path / "out"
    run_command("compress-dataset", checkpoint, source, out, "--quiet")
    options = change if isinstance(change, list) else []
    if change == "document":
        (source / "part-4.txt").write_text("another", encoding="utf-8")
    if change == "checkpoint":
        checkpoint = tmp_path / "other"
        tiny_model(seed=1).save_pretrained(checkpoint)
        tiny_tokenizer().save_pretrained(checkpoint)
    error = run_command("compress-dataset", checkpoint, source, out, "--quiet", *options, code=1).stderr
    assert message in error
    assert "choose another folder" in error


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no documents"),
        ([{"id": 1, "text": "a"}, {"id": "1", "text": "b"}], "two documents of .* have the id '1'"),
        ([{"text": ""}], "document '0' of .* is empty"),
        ([{"body": "a"}], r"row 0 of .* has the fields \['body'\], and no text in 'text': pass --text-field"),
        (["a"], "row 0 of .* has no fields"),
    ],
)
def test_documents_that_cannot_be_compressed(checkpoint, tmp_path, rows, message):
    file = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        compress_dataset(BulkOptions(str(checkpoint), str(file)), tmp_path / "out", progress=False)


def test_a_document_that_is_refused_is_named(stripping_checkpoint, source, tmp_path):
    (source / "blank.txt").write_text(" \n")
    error = run_command("compress-dataset", stripping_checkpoint, source, tmp_path / "out", "--quiet", code=1).stderr
    assert error.startswith("error: document 'blank.txt': `prefix` must be")


def test_what_does_not_belong_together(checkpoint, source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "shard-00000.safetensors").touch()
    error = run_command("compress-dataset", checkpoint, source, out, code=1).stderr
    assert "holds shard-00000.safetensors and no manifest.json: choose another folder" in error
    (out / "shard-00000.safetensors").unlink()
    compress_dataset(BulkOptions(str(checkpoint), str(source)), out, progress=False)
    with pytest.raises(ValueError, match="`weights` is"):
        open_prefixes(out, tiny_model(seed=1))
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "version": 2}))
    with pytest.raises(ValueError, match="is no manifest of semtoken_documents version 1"):
        open_prefixes(out, tiny_model())
