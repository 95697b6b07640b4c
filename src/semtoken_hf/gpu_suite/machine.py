"""Part: what the machine is and what it can do."""

from __future__ import annotations

import importlib.util
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch
from transformers.utils import is_flash_attn_2_available

from .parts import Context


def has_flash_attention() -> bool:
    return bool(is_flash_attn_2_available())


def has_torch_varlen() -> bool:
    """Whether torch brings FlashAttention's variable-length kernel (the device may still lack it)."""
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


def _package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def describe_machine(context: Context) -> None:
    facts: dict[str, object] = {"torch": torch.__version__, "flash-attn": _package_version("flash-attn")}
    facts["torch.nn.attention.varlen"] = "there" if has_torch_varlen() else "missing"
    if context.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(context.device)
        properties = torch.cuda.get_device_properties(context.device)
        facts |= {
            "GPU": f"{properties.name}, {properties.multi_processor_count} multiprocessors",
            "compute capability": f"{properties.major}.{properties.minor}",
            "driver": _driver(),
            "CUDA of torch": torch.version.cuda,
            "cuDNN": str(torch.backends.cudnn.version()),
            "memory, GiB": total / 2**30,
            "free memory, GiB": free / 2**30,
            "TF32 matmul": torch.backends.cuda.matmul.allow_tf32,
        }
    else:
        context.note("No GPU: the suite runs on the processor with SDPA in place of device kernels, to test itself.")
    for name, value in facts.items():
        context.row(fact=name, value=value)
