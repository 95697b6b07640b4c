"""`semtoken doctor`: the installation, the attention of this machine, and folders with every kind of fault."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from semtoken_hf.cli.diagnosis import attention, checkpoint, installation
from semtoken_hf.cli.diagnosis.attention import Shape, check_attention, shape_of
from tests.fixtures.children import ROOT
from tests.fixtures.command_line import run_command, run_json
from tests.fixtures.tiny import tiny_config


def edit(file: Path, **fields) -> None:
    """Change fields of a JSON file; None removes one."""
    content = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def diagnosed(folder, code: int = 0) -> dict[str, dict[str, str]]:
    """The checks of a folder by name; the verdict agrees with them."""
    record = run_json("doctor", folder, code=code)
    faults = [check["name"] for check in record["checks"] if check["status"] == "fault"]
    assert record["faults"] == len(faults)
    assert record["ok"] == (not faults) == (code == 0)
    return {check["name"]: check for check in record["checks"] if check["group"] == "Checkpoint"}


def test_a_machine_without_a_checkpoint():
    record = run_json("doctor")
    groups = {check["group"] for check in record["checks"]}
    assert groups == {"Installed", "Device", "Attention"}
    found = {check["name"]: check for check in record["checks"]}
    assert found["torch"]["found"] == torch.__version__
    assert found["GPU"]["status"] == ("ok" if torch.cuda.is_available() else "absent")
    shown = run_command("doctor").stdout
    assert "all is well" in shown
    assert "ragged batch" in shown


def test_the_ranges_are_those_of_the_package():
    project = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[(.*?)\]", project, re.DOTALL | re.MULTILINE)[1]
    wanted = dict(re.findall(r'"([a-z-]+)([^"]*)"', listed))
    assert wanted == installation.NEEDED
    assert f'requires-python = "{installation.PYTHON}"' in project
    extras = re.findall(r'"([a-z-]+)(?:\[\w+\])?(>=[^"]+)"', project)
    assert {(name, facts[0]) for name, facts in installation.OPTIONAL.items() if facts[0]} <= set(extras)


def test_packages_out_of_range_are_faults(monkeypatch):
    versions = {"torch": "2.8.1", "transformers": "5.30.0", "tokenizers": None, "peft": "0.1", "lm-eval": None}
    monkeypatch.setattr(installation, "installed_version", lambda name: versions.get(name, "99.0"))
    checks = {check["name"]: check for check in run_json("doctor", code=3)["checks"]}
    assert (checks["torch"]["status"], checks["torch"]["advice"]) == (
        "fault",
        "needs >=2.9: pip install 'torch>=2.9'",
    )
    assert checks["transformers"]["status"] == "warning"
    assert (checks["tokenizers"]["status"], checks["tokenizers"]["found"]) == ("fault", "not installed")
    assert checks["peft"]["status"] == "warning"
    assert checks["lm-eval"]["status"] == "absent"
    assert "pip install 'semtoken-hf[evaluate]'" in checks["lm-eval"]["advice"]
    shown = run_command("doctor", code=3).stdout
    assert "2 faults, 2 warnings" in shown


@pytest.mark.parametrize("kind", ["single", "sharded", "adapted"])
def test_a_whole_folder(make_checkpoint, kind):
    folder = make_checkpoint(kind)
    checks = diagnosed(folder)
    assert {c["status"] for c in checks.values()} == ({"ok"} if kind == "adapted" else {"ok", "absent"})
    held = len({name for file in folder.glob("*.safetensors") for name in load_file(file)})
    assert checks["weights"]["found"].startswith(f"{held} tensors")
    assert "those of this version" in checks["modules"]["found"]


def no_file(name):
    return lambda folder: (folder / name).unlink()


def other_config(**fields):
    return lambda folder: edit(folder / "config.json", **fields)


def other_tensor(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def half(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def longer_tokenizer(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<|new {number}|>" for number in range(301 - len(tokenizer))])
    tokenizer.save_pretrained(folder)


def damaged_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("damage", "faults", "says"),
    [
        (no_file("model.safetensors"), {"files", "weights", "encoder"}, "holds no model.safetensors"),
        (half, {"files", "weights", "encoder"}, "damaged or incomplete"),
        (other_tensor(lambda t: t.pop(NORM)), {"weights"}, f"lacks tensors of a SemTokenLlamaForCausalLM: {NORM}"),
        (other_tensor(lambda t: t.update({NORM: torch.zeros(3)})), {"weights"}, "other shapes"),
        (
            other_tensor(lambda t: [t.pop(n) for n in list(t) if "semantic_encoder" in n]),
            {"files", "weights", "encoder"},
            "hold no semantic encoder",
        ),
        (other_config(hidden_size=32), {"weights"}, "other shapes"),
        (other_config(target_ratio=0.5), {"configuration"}, "`target_ratio` must be"),
        (other_config(model_type="llama"), {"files", "configuration"}, "is no SemToken family"),
        (lambda folder: (folder / "config.json").write_text("{"), {"files", "configuration"}, "a JSON file is damaged"),
        (no_file("tokenizer.json"), {"files", "tokenizer"}, "lacks tokenizer.json"),
        (damaged_tokenizer, {"tokenizer"}, ""),
        (longer_tokenizer, {"tokenizer"}, "ids up to 300, and the model has 300 embeddings"),
        (other_config(adapter_subfolder="adapter"), {"files", "adapter"}, "adapter lacks adapter_config.json"),
        (no_file("compression.py"), {"files", "modules"}, "missing: compression.py"),
    ],
)
def test_faults_are_found(make_checkpoint, damage, faults, says):
    folder = make_checkpoint()
    damage(folder)
    checks = diagnosed(folder, code=3)
    assert {name for name, check in checks.items() if check["status"] == "fault"} == faults
    assert says in " ".join(check["found"] for check in checks.values())
    assert all(check["advice"] for check in checks.values() if check["status"] == "fault")


def test_code_of_another_version_is_a_warning(make_checkpoint):
    folder = make_checkpoint()
    (folder / "compression.py").write_text((folder / "compression.py").read_text() + "# mine\n")
    (folder / "extra.py").write_text("print('foreign')\n")
    modules = diagnosed(folder)["modules"]
    assert modules["status"] == "warning"
    assert "changed: compression.py; foreign: extra.py" in modules["found"]
    assert "1 warning" in run_command("doctor", folder).stdout


def test_tensors_that_nothing_reads_are_a_warning(make_checkpoint):
    folder = make_checkpoint()
    other_tensor(lambda tensors: tensors.update({"stray": torch.zeros(1)}))(folder)
    assert diagnosed(folder)["weights"]["status"] == "warning"


def test_a_tokenizer_with_far_fewer_tokens_is_a_warning(make_checkpoint):
    folder = make_checkpoint()
    smaller = Tokenizer(models.WordLevel({"<s>": 1, "</s>": 2, "<pad>": 0, "cat": 3}, "<pad>"))
    smaller.save(str(folder / "tokenizer.json"))
    tokenizer = diagnosed(folder)["tokenizer"]
    assert tokenizer["status"] == "warning"
    assert "may belong to another model" in tokenizer["advice"]


def test_a_plain_checkpoint_is_told_what_to_do(make_checkpoint):
    folder = make_checkpoint()
    other_config(model_type="llama", auto_map={})(folder)
    edit(folder / "tokenizer_config.json", auto_map=None)
    for file in folder.glob("*.py"):
        file.unlink()
    checks = diagnosed(folder, code=3)
    assert "`semtoken convert`" in checks["files"]["found"]
    assert checks["modules"]["found"] == "0 as in this version; no others"


def test_uniform_spans_need_no_encoder(make_checkpoint):
    folder = make_checkpoint()
    other_config(segmentation_mode="uniform")(folder)
    other_tensor(lambda t: [t.pop(n) for n in list(t) if "semantic_encoder" in n])(folder)
    checks = diagnosed(folder)
    assert (checks["encoder"]["status"], checks["weights"]["status"]) == ("absent", "ok")


def test_an_adapter_needs_peft(make_checkpoint, monkeypatch):
    monkeypatch.setattr(checkpoint, "installed_version", lambda name: None)
    assert diagnosed(make_checkpoint("adapted"), code=3)["adapter"]["found"] == "peft is not installed"


def test_nothing_of_the_folder_is_run(make_checkpoint):
    folder = make_checkpoint()
    for file in folder.glob("*.py"):
        file.write_text("raise SystemExit(7)\n")
    assert diagnosed(folder)["modules"]["status"] == "warning"


def test_no_such_checkpoint(tmp_path):
    done = run_command("doctor", tmp_path / "none", code=1)
    assert "is no folder, and not in the cache of the Hub" in done.stderr
    assert "\n" not in done.stderr.strip()


def test_a_hub_id_is_looked_up_in_the_cache_alone(make_checkpoint, monkeypatch):
    folder = make_checkpoint()
    asked = []
    monkeypatch.setattr(checkpoint, "snapshot_download", lambda *a, **k: asked.append((a, k)) or str(folder))
    assert diagnosed("me/tiny")["files"]["status"] == "ok"
    assert asked == [(("me/tiny",), {"local_files_only": True})]


def test_attention_is_what_will_run(monkeypatch):
    shape = shape_of(tiny_config(dtype="float32"))
    assert shape == Shape(4, 2, 16, torch.float32)
    checks = {check.name: check for check in check_attention(shape, torch.device("cpu"))}
    assert checks["ragged batch"].found == "semtoken_varlen: SDPA, row by row"
    assert "need a GPU" in checks["ragged batch"].advice
    assert checks["prefill, a row"].found == "sdpa: PyTorch's FlashAttention"
    torch_attention = sys.modules["semtoken_hf.varlen_semtoken"]._torch_attention
    monkeypatch.setattr(attention, "_kernel_for", lambda query: torch_attention)
    assert check_attention(shape, torch.device("cpu"))[-1].found == "semtoken_varlen: PyTorch's varlen_attn"


class FakeQuery:
    """A query on a GPU of this capability, as far as the choice of a kernel asks."""

    is_cuda = True

    def __init__(self, dtype: torch.dtype, head_dim: int):
        self.dtype, self.shape, self.device = dtype, (1, 4, head_dim), torch.device("cuda")


@pytest.mark.parametrize(
    ("dtype", "head_dim", "flash", "says"),
    [
        (torch.float32, 64, True, "need float16 or bfloat16, not float32"),
        (torch.bfloat16, 60, True, "heads of a multiple of 8"),
        (torch.bfloat16, 64, False, "pip install flash-attn"),
        (torch.bfloat16, 64, True, "one call for all rows"),
    ],
)
def test_why_that_kernel(monkeypatch, dtype, head_dim, flash, says):
    module = sys.modules["semtoken_hf.varlen_semtoken"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(module, "is_flash_attn_2_available", lambda: flash)
    monkeypatch.setattr(module, "_torch_varlen", lambda: None)
    monkeypatch.setattr(attention, "_torch_varlen", lambda: None)
    assert says in attention._why(FakeQuery(dtype, head_dim))


def test_the_embedded_checkpoint_is_whole(tmp_path):
    folder = shutil.copytree(ROOT / "model_cards" / "semtoken-llama-tiny", tmp_path / "tiny")
    checks = diagnosed(folder)
    assert all(check["status"] in ("ok", "absent") for name, check in checks.items() if name != "modules")


def test_upgrade_rewrites_an_old_folder_in_place(tmp_path):
    """Old names, old modules, no markers; afterwards nothing is left to say, and the weights are the same bytes."""
    folder = tmp_path / "old"
    shutil.copytree(ROOT / "model_cards" / "semtoken-llama-tiny", folder)
    fields = json.loads((folder / "config.json").read_text())
    for new, old in {
        "num_sink_tokens": "keep_first",
        "recent_window": "keep_last",
        "max_slots": "max_kept_tokens",
    }.items():
        fields[old] = fields.pop(new)
    del fields["auto_map"]["AutoModelForSequenceClassification"]
    (folder / "config.json").write_text(json.dumps({**fields, "keep_last": 7, "text_markers": None}))
    (folder / "span_planner.py").write_text("# of an earlier version\n")
    (folder / "gone.py").write_text("# of an earlier version\n")
    weights = (folder / "model.safetensors").read_bytes()
    assert diagnosed(folder)["modules"]["status"] != "ok"
    record = run_json("doctor", folder, "--upgrade")
    assert {c["name"]: c["status"] for c in record["checks"] if c["group"] == "Checkpoint"}["modules"] == "ok"
    fields = json.loads((folder / "config.json").read_text())
    assert fields["recent_window"] == 7
    assert "keep_last" not in fields
    assert fields["text_markers"]["sentence_ends"]
    assert "AutoModelForSequenceClassification" in fields["auto_map"]
    assert (folder / "model.safetensors").read_bytes() == weights
    assert not (folder / "gone.py").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_upgrade_needs_a_semtoken_folder(tmp_path):
    assert "--upgrade needs" in run_command("doctor", "--upgrade", code=2).stderr
    assert "no folder" in run_command("doctor", tmp_path / "none", "--upgrade", code=1).stderr
