"""NAME=VALUE and numbers, as options of the command line and of scripts have them."""

from __future__ import annotations

import json
from typing import Any

from .option_names import dashed


def read_pairs(values: list[str], option: str) -> dict[str, str]:
    """`["a=b"]` as `{"a": "b"}`.

    Raises:
        ValueError: one has no `=`, or no name before it.
    """
    if wrong := [value for value in values if "=" not in value[1:]]:
        raise ValueError(f"--{dashed(option)} takes NAME=VALUE, got {wrong}")
    return dict(value.split("=", 1) for value in values)


def read_numbers(values: list[str], option: str) -> dict[str, float]:
    """`["a=0.5"]` as `{"a": 0.5}`.

    Raises:
        ValueError: one is not NAME=NUMBER with a finite number that is not negative.
    """
    numbers = {}
    for name, value in read_pairs(values, option).items():
        try:
            numbers[name] = float(value)
        except ValueError:
            numbers[name] = -1.0
        if not 0 <= numbers[name] < float("inf"):
            raise ValueError(f"--{dashed(option)} takes NAME=NUMBER, 0 or more, got {f'{name}={value}'!r}")
    return numbers


def read_fields(values: list[str], option: str) -> dict[str, Any]:
    """`["a=4", "b=x"]` as `{"a": 4, "b": "x"}`: a value that is JSON counts as such, any other as a string.

    Raises:
        ValueError: as `read_pairs`.
    """
    fields: dict[str, Any] = {}
    for name, value in read_pairs(values, option).items():
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
    return fields


def is_number(text: str) -> bool:
    """Whether a text reads as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


__all__ = ["is_number", "read_fields", "read_numbers", "read_pairs"]
