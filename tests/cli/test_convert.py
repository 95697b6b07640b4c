"""`semtoken convert`: what it writes and says, mistakes that end with one line, and pickle only on request."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from semtoken_hf.conversion.weights import find_tensors
from tests.fixtures.command_line import run_command, run_json


def test_converts_with_options_and_fields(make_llama, encoder_folder, tmp_path):
    out = tmp_path / "out"
    options = ["--encoder-kind", "static", "--static-dim", "8", "--quiet"]
    fields = ["--set", "target_ratio=4", "segmentation_mode=greedy", "--set", "recent_window=8"]
    done = run_command("convert", make_llama(), encoder_folder, out, *options, *fields)
    assert done.stdout.splitlines()[-1] == str(out)
    assert done.stderr == ""
    config = json.loads((out / "config.json").read_text())
    assert (config["target_ratio"], config["segmentation_mode"], config["recent_window"]) == (4, "greedy", 8)
    assert config["encoder_config"]["hidden_size"] == 8


def test_what_it_says_to_machines_is_what_was_written(make_llama, encoder_folder, tmp_path):
    out = tmp_path / "out"
    # The list ends where an argument has no `=`.
    record = run_json("convert", "--set", "target_ratio=3", make_llama(), encoder_folder, out, "--encoder-layers", 1)
    files = {path.name: path.stat().st_size for path in out.iterdir()}
    assert record["files"] == files
    assert (record["folder"], record["bytes"]) == (str(out), sum(files.values()))
    assert record["tensors"] == len(find_tensors(out))
    config = json.loads((out / "config.json").read_text())
    assert record["fields"].pop("protected_tokens") == len(config["protected_token_ids"])
    assert record["fields"]["target_ratio"] == 3
    counted = {kind: len(ids) for kind, ids in config["text_markers"].items()}
    assert record["fields"].pop("text_markers") == counted
    assert record["fields"] == {name: config[name] for name in record["fields"]}
    assert config["encoder_config"]["num_hidden_layers"] == 1


def test_bars_are_on_standard_error_alone(make_llama, encoder_folder, tmp_path):
    done = run_command("convert", make_llama(), encoder_folder, tmp_path / "out")
    assert "write weights" in done.stderr
    assert "write weights" not in done.stdout
    quiet = run_command("convert", make_llama(), encoder_folder, tmp_path / "out", "--overwrite", "--quiet")
    assert (quiet.stdout, quiet.stderr) == (done.stdout, "")


def test_none_means_no_encoder(make_llama, tmp_path):
    run_command("convert", make_llama(), "none", tmp_path / "out", "--quiet", "--set", "segmentation_mode=uniform")
    assert (tmp_path / "out" / "config.json").exists()


def test_pickle_is_read_on_request_alone(make_llama, encoder_folder, tmp_path):
    folder = make_llama()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused = run_command("convert", folder, encoder_folder, tmp_path / "out", code=1).stderr
    assert "--allow-pickle" in refused.splitlines()[-1]
    run_command("convert", folder, encoder_folder, tmp_path / "out", "--allow-pickle")
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--set", "ratio=4"], 1, "unknown configuration fields ['ratio']"),
        (["--set", "target_ratio=0.5"], 1, "`target_ratio` must be"),
        (["--set", "overwrite=1"], 2, "options of their own"),
        (["--set", "target_ratio"], 2, "--set takes NAME=VALUE"),
        (["--encoder-kind", "lstm"], 2, "'transformer'"),
        (["--protect-rare", "much"], 2, "--protect-rare"),
    ],
)
def test_mistakes_end_with_one_line(make_llama, encoder_folder, tmp_path, arguments, code, message):
    done = run_command("convert", make_llama(), encoder_folder, tmp_path / "out", "--quiet", *arguments, code=code)
    assert message in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_not_touched(make_llama, encoder_folder, tmp_path):
    (tmp_path / "out").mkdir()
    done = run_command("convert", make_llama(), encoder_folder, tmp_path / "out", code=1)
    assert done.stderr == f"error: {tmp_path / 'out'} exists; choose another folder or pass --overwrite\n"
