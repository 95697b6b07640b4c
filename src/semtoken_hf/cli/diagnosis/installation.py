"""What is installed, and whether it is in the range that this package is made for."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from packaging.specifiers import SpecifierSet
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_kernels_available

from ...varlen_semtoken import _torch_varlen
from .checks import Check

INSTALLED, DEVICE = "Installed", "Device"
PYTHON = ">=3.10"
# As in pyproject.toml.
NEEDED = {
    "torch": ">=2.9",
    "transformers": ">=5.17,<6",
    "tokenizers": ">=0.22",
    "safetensors": ">=0.5",
    "accelerate": ">=1.10",
    "huggingface-hub": ">=1.0",
    "numpy": "",
    "tqdm": "",
    "typer": ">=0.20",
    "rich": ">=13.8",
}
# The releases that the tests run against.
TESTED_TRANSFORMERS = ">=5.17,<5.24"
# What each is for, and how to get it.
OPTIONAL = {
    "peft": (">=0.18", "adapters: semtoken adapt --trainable lora, and loading what it makes", "semtoken-hf[adapt]"),
    "datasets": ("", "data sets of the Hub as text for adapt and evaluate", "semtoken-hf[adapt]"),
    "matplotlib": ("", "plots of adapt, evaluate and benchmark", "semtoken-hf[adapt]"),
    "lm-eval": (">=0.4.13", "semtoken lm-eval and evaluate's LongBench metrics", "semtoken-hf[evaluate]"),
    "fastapi": ("", "transformers serve", "semtoken-hf[serve]"),
    "gguf": (">=0.17", "converting GGUF files", "semtoken-hf[gguf]"),
    "kvpress": ("", "its presses, in an environment of their own: scripts/kvpress_baselines.sh", ""),
}


def check_installation() -> list[Check]:
    """Python, what is needed, and what is optional."""
    python = platform.python_version()
    is_fit = SpecifierSet(PYTHON).contains(python)
    checks = [Check(INSTALLED, "python", "ok" if is_fit else "fault", python, "" if is_fit else f"needs {PYTHON}")]
    checks += [_check_package(name, wanted) for name, wanted in NEEDED.items()]
    return checks + [_check_optional(name, *facts) for name, facts in OPTIONAL.items()]


def installed_version(name: str) -> str | None:
    """Of a distribution; None if it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _check_package(name: str, wanted: str) -> Check:
    found = installed_version(name)
    install = f"pip install '{name}{wanted}'"
    if found is None:
        return Check(INSTALLED, name, "fault", "not installed", install)
    if not SpecifierSet(wanted).contains(found, prereleases=True):
        return Check(INSTALLED, name, "fault", found, f"needs {wanted}: {install}")
    if name == "transformers" and not SpecifierSet(TESTED_TRANSFORMERS).contains(found, prereleases=True):
        return Check(INSTALLED, name, "warning", found, f"tested with {TESTED_TRANSFORMERS} alone")
    return Check(INSTALLED, name, "ok", found)


def _check_optional(name: str, wanted: str, purpose: str, extra: str) -> Check:
    found = installed_version(name)
    install = f"; pip install '{extra}'" if extra else ""
    if found is None:
        return Check(INSTALLED, name, "absent", "not installed", f"for {purpose}{install}")
    if not SpecifierSet(wanted).contains(found, prereleases=True):
        return Check(INSTALLED, name, "warning", found, f"needs {wanted}{install}")
    return Check(INSTALLED, name, "ok", found)


def check_device() -> list[Check]:
    """The GPU, if there is one, and the kernels of attention that could run on it."""
    checks = [_check_gpu()]
    for name, is_there, purpose in (
        ("flash-attn 2", is_flash_attn_2_available(), "attn_implementation flash_attention_2 and semtoken_varlen"),
        ("flash-attn 3", is_flash_attn_3_available(), "attn_implementation flash_attention_3"),
        ("kernels", is_kernels_available(), "flash_attention_2 from the Hub, where flash-attn is not installed"),
        ("torch varlen_attn", _torch_varlen() is not None, "semtoken_varlen, where flash-attn is not installed"),
    ):
        needs_newer = "needs a newer PyTorch" if name == "torch varlen_attn" else "not installed"
        found = "available" if is_there else _not_usable(name) or needs_newer
        checks.append(Check(DEVICE, name, "ok" if is_there else "absent", found, "" if is_there else f"for {purpose}"))
    return checks


def _not_usable(name: str) -> str:
    """Why Transformers does not take a package that is there."""
    module = {"flash-attn 2": "flash_attn", "flash-attn 3": "flash_attn_interface"}.get(name)
    if module is None or find_spec(module) is None:
        return ""
    return "installed, and not usable here: it needs a GPU" if not torch.cuda.is_available() else "installed, too old"


def _check_gpu() -> Check:
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(0)
        runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        found = f"{torch.cuda.get_device_name(0)}, {runtime}, compute capability {major}.{minor}"
        return Check(DEVICE, "GPU", "ok", found + ("" if torch.cuda.device_count() == 1 else ", the first of several"))
    if torch.accelerator.is_available():
        return Check(DEVICE, "GPU", "ok", str(torch.accelerator.current_accelerator()))
    if torch.version.cuda:
        return Check(DEVICE, "GPU", "warning", "none is visible", f"this PyTorch is for CUDA {torch.version.cuda}")
    threads = f"{torch.get_num_threads()} CPU threads"
    return Check(DEVICE, "GPU", "absent", f"none; {sys.platform}, {threads}", "the CPU does it")


__all__ = ["NEEDED", "OPTIONAL", "check_device", "check_installation", "installed_version"]
