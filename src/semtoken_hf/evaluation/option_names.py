"""Names of options: shown with dashes, and read with underscores, too."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any

from transformers import HfArgumentParser

# `--target_ratio` and the name in `--target_ratio=4`.
NAME = re.compile(r"--[A-Za-z][\w-]*(?==|\Z)")


def dashed(name: str) -> str:
    """`target_ratio` as the option has it, `target-ratio`."""
    return name.replace("_", "-")


def with_dashes(arguments: Sequence[str]) -> list[str]:
    """The same command line with dashes in the names of options; values, and all behind `--`, stay as they are."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return [NAME.sub(lambda name: dashed(name[0]), arg, count=1) for arg in arguments[:end]] + list(arguments[end:])


class DashedParser(argparse.ArgumentParser):
    """Reads `--target_ratio`, the name of earlier releases, as `--target-ratio`."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        return super().parse_known_args(with_dashes(sys.argv[1:] if args is None else args), namespace)


class DataclassParser(DashedParser, HfArgumentParser):
    """The fields of dataclasses as options, with dashes alone; `HfArgumentParser` shows both."""

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:  # type: ignore[override]
        return super().add_argument(*dict.fromkeys(map(dashed, names)), **options)


__all__ = ["DashedParser", "DataclassParser", "dashed", "with_dashes"]
