"""`semtoken export`."""

from __future__ import annotations

import os
import stat

from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tests.fixtures.command_line import run_command, run_json
from tests.fixtures.tiny import tiny_model, tiny_tokenizer


def test_the_plain_model_can_be_read_by_others(tmp_path):
    source, out = tmp_path / "semtoken", tmp_path / "plain"
    tiny_model().save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    before = os.umask(0o022)
    try:
        assert run_json("export", source, out, "--quiet") == {"folder": str(out)}
    finally:
        os.umask(before)
    assert type(AutoModelForCausalLM.from_pretrained(out)) is LlamaForCausalLM
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [out, *out.iterdir()]}
    assert modes.pop("plain") == 0o755
    assert {"config.json", "model-00001-of-00001.safetensors", "tokenizer.json"} <= modes.keys()
    assert set(modes.values()) == {0o644}
    assert "exists" in run_command("export", source, out, code=1).stderr
    assert "the plain model" in run_command("export", source, out, "--overwrite").stdout
