"""An evaluation put into the folder of a model card: its section, its figures, and the plots that the section links."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from ..files import write_text
from .detail_tables import without_folders
from .model_index import update_card

LINKED_PLOT = re.compile(r"\]\(plots/([\w.-]+\.png)\)")


def put_into_card(evaluation: Path, folder: Path) -> Path:
    """Put what lies in the folder of an evaluation into the folder of a card; returns the card.

    Args:
        evaluation: holds `metrics.json`, `report.md` and `plots`.
        folder: its `README.md` has the markers of an evaluation; gets `metrics.json`, rounded, and `plots`.

    Raises:
        FileNotFoundError: `folder` has no card.
        ValueError: the card lacks the markers.
    """
    card = folder / "README.md"
    metrics = json.loads((evaluation / "metrics.json").read_text(encoding="utf-8"))
    section = (evaluation / "report.md").read_text(encoding="utf-8")
    update_card(card, metrics, section)
    short = json.dumps(shortened(metrics), separators=(",", ":"), ensure_ascii=False)
    write_text(folder / "metrics.json", short + "\n")
    (folder / "plots").mkdir(exist_ok=True)
    for name in LINKED_PLOT.findall(section):
        shutil.copyfile(evaluation / "plots" / name, folder / "plots" / name)
    return card


def shortened(metrics: dict[str, Any]) -> dict[str, Any]:
    """`metrics` with six digits of every figure, without groups of examples and without folders of this machine."""
    cells = [{key: value for key, value in cell.items() if key != "groups"} for cell in metrics["cells"]]
    return rounded({**metrics, "config": without_folders(metrics["config"]), "cells": cells})


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: rounded(entry) for name, entry in value.items()}
    return [rounded(entry) for entry in value] if isinstance(value, list) else value


__all__ = ["put_into_card"]
