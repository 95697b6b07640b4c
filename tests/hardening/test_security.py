"""What the modules in a checkpoint can do, and what loading one does; SECURITY.md says so to users."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from semtoken_hf.publishing.module_hashes import PACKAGE, compare_modules, needed_modules, shipped_modules
from semtoken_hf.publishing.selection import is_loaded, select_files
from tests.fixtures.adapted import adapted_model
from tests.fixtures.children import run_clean
from tests.fixtures.tiny import BERT, tiny_model, tiny_tokenizer
from tests.hardening.code_review import dangers, habits, review

# Reviewed: what a module needs that stands out, and why.
SHIPPED = {
    # PEFT, where the checkpoint has an adapter.
    "adapter_semtoken.py": {
        "import importlib.import_module",
        "import_module(peft)",
        "import_module(peft.tuners.lora)",
    },
    # The kernels of attention that there are, and their arguments.
    "varlen_semtoken.py": {
        "import importlib.import_module",
        "import inspect",
        "import_module(flash_attn)",
        "import_module(torch.nn.attention.varlen)",
    },
    # The page of a plan, which the package draws.
    "compression.py": {"import importlib.import_module", "import_module(semtoken_hf.inspection.page)"},
    # Names under which `transformers serve` looks for the classes; defaults of fields.
    "configuration_semtoken.py": {"import sys", "setattr"},
    # Continuous batching, which the package does.
    "generation_semtoken.py": {
        "import importlib.import_module",
        "import_module(semtoken_hf.serving.continuous_batching)",
        "setattr",
    },
    # What was not written whole is removed.
    "prefix_semtoken.py": {".unlink"},
    # Whether a forward of others takes any argument.
    "read_positions.py": {"import inspect"},
    # A type of paths.
    "tokenization_semtoken_fast.py": {"import os"},
}
# On the developer's machine.
DEVELOPMENT = {
    "benchmarking/clock.py": {"import ctypes"},  # gives memory back to the system before it is measured
    "benchmarking/configuration.py": {"compile"},  # the name of an option
    "conversion/pickled_weights.py": {"import pickle", "torch.load of weights only"},
    "evaluation/tasks/longbench.py": {"import yaml"},  # with a SafeLoader
    "gpu_suite/gpu_tests.py": {"import subprocess"},
    "gpu_suite/machine.py": {"import subprocess"},
    "gpu_suite/suite.py": {"import subprocess"},
    "cli/serve.py": {"import socket"},  # it listens
    "serving/middleware.py": {"import asyncio"},  # threads and tasks
    "serving/upstreams.py": {"import asyncio", "import httpx", "import urllib.parse.urlsplit"},  # it asks engines
    "serving/prompt_embeds.py": {"import pickle", "torch.load of weights only", "torch.save"},  # vLLM's format
    "training/corpus.py": {"np.load"},  # of arrays, pickle being off by default
    "training/reference.py": {"compile"},  # the name of an option
}


def by_file(look, files):
    found = {file.relative_to(PACKAGE).as_posix(): look(file) for file in files}
    return {name: what for name, what in found.items() if what}


def test_the_shipped_modules_only_compute():
    assert by_file(review, shipped_modules()) == SHIPPED


def test_what_else_the_package_does_is_known():
    """The rest of the flat modules, and what stays on the developer's machine."""
    shipped = set(shipped_modules())
    assert by_file(dangers, [f for f in sorted(PACKAGE.rglob("*.py")) if f not in shipped]) == DEVELOPMENT


@pytest.mark.parametrize(
    ("code", "finding"),
    [
        ("def f():\n    import subprocess", "import subprocess"),
        ("from os import system as s", "import os.system"),
        ("run = exec", "exec"),
        ("import torch\ntorch.load(f, weights_only=x)", "torch.load"),
        ("import importlib\nimportlib.import_module(name)", "import_module(a variable)"),
        ("open(f, mode=m)", "open for writing"),
    ],
)
def test_the_review_finds(tmp_path, code, finding):
    file = tmp_path / "module.py"
    file.write_text(code)
    assert finding in dangers(file) | habits(file)


def test_the_review_lets_pass_what_is_harmless(tmp_path):
    file = tmp_path / "module.py"
    file.write_text("import re\nre.compile('x')\nopen(f)\nopen(f, 'rb')\npath.open()\nmodel.eval()\n")
    assert review(file) == set()


CHILD = (Path(__file__).parent / "audited_child.py").read_text(encoding="utf-8")
EVIL = "from pathlib import Path\nPath({0!r}).touch()\nraise SystemExit('ran')\n"


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def poison(folder, exploded):
    """Files that nothing may run or unpickle; each would make `exploded`."""
    evil = EVIL.format(str(exploded))
    (folder / "custom_generate").mkdir()
    names = ["evil.py", "__init__.py", "sitecustomize.py", "usercustomize.py", "conftest.py", "torch.py", "numpy.py"]
    names += ["custom_generate/generate.py", "tokenization_semtoken.py", "modeling_llama.py", "setup.py"]
    for name in names:
        (folder / name).write_text(evil)
    bomb = pickle.dumps(Bomb(exploded))
    for name in ("tokenizer.pkl", "vocab.pkl", "training_args.bin", "adapter_model.bin", "optimizer.pt", "config.pkl"):
        (folder / name).write_bytes(bomb)
    torch.save({"bomb": Bomb(exploded)}, folder / "pytorch_model.bin")
    torch.save({"bomb": Bomb(exploded)}, folder / "model.pt")
    if (folder / "adapter").is_dir():
        (folder / "adapter" / "adapter_model.bin").write_bytes(bomb)
    config = json.loads((folder / "config.json").read_text())
    classes = {name: f"evil.{name}" for name in ("AutoConfig", "AutoModel")}
    config["encoder_config"]["auto_map"] = classes
    config["custom_pipelines"] = {"text-generation": {"impl": "evil.Pipeline", "pt": ["AutoModelForCausalLM"]}}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """A poisoned folder, and what loading it and generating did, in a process without this package."""
    root = tmp_path_factory.mktemp("audited")
    folder, home, exploded = root / "folder", root / "home", root / "exploded"
    adapted_model(encoder_config=dict(BERT), encoder_window=32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    poison(folder, exploded)
    before = sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*"))
    # PyTorch's own cache, too, lies in the home.
    facts = run_clean(CHILD, folder, home, home=home, variables={"TORCHINDUCTOR_CACHE_DIR": str(home / "inductor")})
    assert sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*")) == before
    assert not exploded.exists()
    return folder, home, facts


def test_loading_runs_the_modules_of_the_folder_and_no_other_code(audited):
    folder, home, facts = audited
    assert facts["merged"]
    entries = [f"{name}.py" for name in ("configuration_semtoken_llama", "modeling_semtoken_llama")]
    wanted = needed_modules(folder, [*entries, "tokenization_semtoken_fast.py"])
    ran = [Path(file).relative_to(home / "modules") for file in facts["code"]]
    # Transformers' own, which are empty.
    packages = [file for file in ran if file.name == "__init__.py"]
    assert all((home / "modules" / file).read_bytes() == b"" for file in packages)
    assert {file.name for file in ran if file not in packages} == wanted
    assert facts["foreign"] == []
    for file in ran:
        if file not in packages:
            assert (home / "modules" / file).read_bytes() == (folder / file.name).read_bytes()


def test_loading_starts_nothing_and_asks_nobody(audited):
    _, _, facts = audited
    assert facts["processes"] == []
    assert facts["sockets"] == []
    assert facts["unpickled"] == []


def test_loading_writes_to_the_caches_alone(audited):
    _, home, facts = audited
    caches = tuple(str(home / name) for name in ("modules", "inductor"))
    assert [path for path in facts["written"] if not path.startswith(caches)] == []
    assert any(path.startswith(caches[0]) for path in facts["written"])


def test_the_hook_would_have_seen_it(audited):
    assert audited[2]["control"] == ["code", "foreign", "processes", "sockets", "unpickled", "written"]


def test_foreign_files_are_named_and_never_pushed(tmp_path):
    folder = tmp_path / "folder"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    names = {p.name for p in folder.iterdir()}
    poison(folder, tmp_path / "exploded")
    assert "evil.py" in compare_modules(folder).foreign
    assert "custom_generate/generate.py" in compare_modules(folder).foreign
    assert {path for path in select_files(folder).files if "/" not in path} <= names
    assert "custom_generate/generate.py" not in select_files(folder).files
    # One that an earlier push left would be run by other classes.
    assert is_loaded("custom_generate/generate.py")
    assert not (tmp_path / "exploded").exists()
