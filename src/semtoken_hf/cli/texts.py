"""Figures as people read them, and the compression fields of a configuration."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ..configuration_semtoken import SemTokenConfigMixin

FIELDS = tuple(field.name for field in fields(SemTokenConfigMixin) if field.name != "encoder_config")
UNITS = ("B", "KB", "MB", "GB")


def size_text(nbytes: float) -> str:
    """Bytes in units of 1,000, as disks are sold."""
    power = 0
    while nbytes >= 1000 and power < len(UNITS) - 1:
        nbytes, power = nbytes / 1000, power + 1
    return f"{nbytes:,.0f} {UNITS[power]}" if power == 0 or nbytes >= 100 else f"{nbytes:.1f} {UNITS[power]}"


def compression_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Of a config.json; ids that never merge, and those of text markers, are too many to show, and counted."""
    found = {name: config[name] for name in FIELDS if name in config}
    if "protected_token_ids" in found:
        found["protected_tokens"] = len(found.pop("protected_token_ids") or [])
    if found.get("text_markers"):
        found["text_markers"] = {kind: len(ids) for kind, ids in found["text_markers"].items()}
    return found
