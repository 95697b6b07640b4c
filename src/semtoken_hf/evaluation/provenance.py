"""Where a figure comes from: the command, the versions, the machine and the date that every report carries."""

from __future__ import annotations

import datetime
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .files import write_text

PACKAGES = ("torch", "transformers", "tokenizers", "accelerate")


def processor_name() -> str:
    """Model name of the first processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def provenance() -> dict[str, str]:
    """Command, versions, machine and UTC date."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    return {
        "command": command_line(sys.argv),
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
        "machine": f"{processor_name()}, {torch.get_num_threads()} threads, {device}",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def command_line(argv: list[str]) -> str:
    """What was run, as one types it: without the folders of this machine."""
    program = Path(argv[0])
    start = f"python scripts/{program.name}" if program.suffix == ".py" else program.name
    if program.name == "__main__.py":  # the same as the console script
        start = "semtoken"
    arguments = shlex.join(map(without_folder, argv[1:]))
    return f"{start} {arguments}".rstrip()


def without_folder(value: str) -> str:
    """An option's value, FILE or NAME=FILE, with the last part of an absolute path alone."""
    name, equals, path = value.rpartition("=")
    return name + equals + Path(path).name if Path(path).is_absolute() else value


def markdown_provenance() -> str:
    """`provenance()` as a Markdown list."""
    return "\n".join(f"- {name}: `{value}`" for name, value in provenance().items())


def publish_report(lines: list[str], output: Path | None) -> None:
    """Print a Markdown report closed by its provenance, and write it to `output` if that is given."""
    report = "\n".join([*lines, "", markdown_provenance(), ""])
    print(report)
    if output:
        write_text(output, report)
