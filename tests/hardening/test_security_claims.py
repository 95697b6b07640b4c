"""What else SECURITY.md says: of pickles, pinned revisions, saving and conversion."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from semtoken_hf import SemTokenLlamaForCausalLM, convert_checkpoint
from semtoken_hf.publishing.push import prepare, push
from tests.conversion.conftest import encoder_folder, make_llama  # noqa: F401 (fixtures)
from tests.fixtures.children import ROOT
from tests.fixtures.tiny import random_ids, tiny_model, tiny_tokenizer
from tests.hardening.kills import NEVER, watch
from tests.hardening.test_security import EVIL, Bomb

TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def checkpoint(folder):
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_the_files_that_it_names_exist():
    for name in re.findall(r"`((?:scripts|model_cards|docs)/[^`]+)`|\]\(([^)]+)\)", TEXT):
        assert (ROOT / "".join(name)).exists(), name


def test_a_pickle_in_a_checkpoint_runs_nothing(tmp_path):
    folder, exploded = checkpoint(tmp_path / "folder"), tmp_path / "exploded"
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**state, "bomb": Bomb(exploded)}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"[Ww]eights.?only"):
        SemTokenLlamaForCausalLM.from_pretrained(folder)
    assert not exploded.exists()


def test_a_pinned_revision_is_code_and_weights_of_that_commit(tmp_path, hub, remote_modules):
    """The branch moves on to other weights and to code that must not run.

    Where this package is installed, the model's class is its own; `tests/hub` loads it where it is not.
    """
    folder, exploded = checkpoint(tmp_path / "folder"), tmp_path / "exploded"
    done = push(prepare(folder, "me/tiny"))
    first = tiny_model()
    tiny_model(seed=1).save_pretrained(folder)
    for module in folder.glob("*.py"):
        module.write_text(module.read_text() + EVIL.format(str(exploded)))
    push(prepare(folder, "me/tiny"))
    pinned = {"revision": done.sha, "trust_remote_code": True}
    model = AutoModelForCausalLM.from_pretrained("me/tiny", **pinned)
    tokenizer = AutoTokenizer.from_pretrained("me/tiny", **pinned)
    assert torch.equal(model.lm_head.weight, first.lm_head.weight)
    assert tokenizer("the cat sat on the mat " * 20, return_span_ids=True)["span_ids"][-1] > 0
    assert done.sha in type(tokenizer).__module__
    assert not exploded.exists()
    with pytest.raises(SystemExit, match="ran"):  # the code of the branch is of the kind that shows
        AutoTokenizer.from_pretrained("me/tiny", trust_remote_code=True)


def test_generating_and_preparing_a_push_write_nothing(tmp_path):
    """The whole of the disk is watched, from now to the end of this process, at next to no cost."""
    pushed = checkpoint(tmp_path / "pushed")
    prepare(pushed, "me/tiny")
    model = tiny_model()
    model.generate(random_ids(1, 90), max_new_tokens=2)  # what is imported late
    changes = watch("/", NEVER) if sys.platform != "win32" else []
    model.generate(random_ids(1, 90), max_new_tokens=2)
    prepare(pushed, "me/tiny")
    assert changes == []
    model.save_pretrained(tmp_path / "saved")
    assert changes
    assert [path for path in changes if not path.startswith(str(tmp_path))] == []


@pytest.mark.parametrize("trusted", [False, True])
def test_conversion_runs_no_code_of_its_sources(make_llama, encoder_folder, tmp_path, trusted):  # noqa: F811
    """Both name modules of their own everywhere. Trust is for the encoder's tokenizer alone."""
    source, exploded = make_llama(), tmp_path / "exploded"
    for folder in (source, encoder_folder):
        (folder / "evil.py").write_text(EVIL.format(str(exploded)))
        for name in ("config.json", "tokenizer_config.json"):
            content = json.loads((folder / name).read_text())
            classes = {f"Auto{kind}": f"evil.{kind}" for kind in ("Config", "Model", "ModelForCausalLM")}
            content["auto_map"] = {**classes, "AutoTokenizer": ["evil.Slow", "evil.Fast"]}
            (folder / name).write_text(json.dumps(content))
    sources = source, encoder_folder, tmp_path / "out"
    if trusted:
        with pytest.raises(SystemExit, match="ran"):
            convert_checkpoint(*sources, progress=False, trust_remote_code=True)
        assert exploded.exists()
        assert not (tmp_path / "out").exists()
        return
    out = convert_checkpoint(*sources, progress=False)
    assert not exploded.exists()
    assert not (out / "evil.py").exists()
    for name in ("config.json", "tokenizer_config.json"):
        assert re.findall(".*evil.*", (out / name).read_text()) == []
