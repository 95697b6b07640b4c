from __future__ import annotations

import json

import pytest

from tests.fixtures.scripts import main_of


@pytest.fixture
def run_script(monkeypatch):
    return main_of("convert.py", monkeypatch)


def test_converts_with_options_and_fields(run_script, make_llama, encoder_folder, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--encoder_kind", "static", "--static_dim", "8", "--quiet"]
    run_script(make_llama(), encoder_folder, out, *options, "--set", "target_ratio=4", "segmentation_mode=greedy")
    assert capsys.readouterr().out.strip().endswith(str(out))
    config = json.loads((out / "config.json").read_text())
    assert (config["target_ratio"], config["segmentation_mode"]) == (4, "greedy")
    assert config["encoder_config"]["hidden_size"] == 8


def test_a_cheaper_encoder(run_script, make_llama, encoder_folder, tmp_path):
    out = tmp_path / "out"
    run_script(make_llama(), encoder_folder, out, "--encoder_layers", "1", "--encoder_dtype", "float32", "--quiet")
    config = json.loads((out / "config.json").read_text())
    assert (config["encoder_config"]["num_hidden_layers"], config["encoder_dtype"]) == (1, "float32")


def test_none_means_no_encoder(run_script, make_llama, tmp_path):
    run_script(make_llama(), "none", tmp_path / "out", "--quiet", "--set", "segmentation_mode=uniform")
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--set", "ratio=4"], 1, "unknown configuration fields ['ratio']"),
        (["--set", "overwrite=1"], 2, "options of their own"),
        (["--set", "target_ratio"], 2, "expected FIELD=VALUE"),
        (["--encoder_kind", "lstm"], 2, "invalid choice"),
    ],
)
def test_mistakes_end_with_one_line(run_script, make_llama, encoder_folder, tmp_path, capsys, arguments, code, message):
    with pytest.raises(SystemExit) as stopped:
        run_script(make_llama(), encoder_folder, tmp_path / "out", "--quiet", *arguments)
    assert stopped.value.code == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
