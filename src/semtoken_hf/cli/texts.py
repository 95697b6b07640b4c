"""Figures as people read them, and the compression fields of a configuration."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ..configuration_semtoken import SemTokenConfigMixin

FIELDS = tuple(field.name for field in fields(SemTokenConfigMixin) if field.name != "encoder_config")


def size_text(nbytes: float) -> str:
    """Bytes in units of 1,000, as disks are sold."""
    for unit in ("B", "KB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            return f"{nbytes:,.0f} {unit}" if unit == "B" or nbytes >= 100 else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    raise AssertionError


def compression_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Of a config.json; the ids that never merge are too many to show, and counted."""
    found = {name: config[name] for name in FIELDS if name in config}
    if "protected_token_ids" in found:
        found["protected_tokens"] = len(found.pop("protected_token_ids") or [])
    return found
