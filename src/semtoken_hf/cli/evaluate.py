"""`semtoken evaluate`: quality, memory and time of a checkpoint beside its baselines, and the ablations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..evaluation.configuration import EvaluationConfig
from ..evaluation.tasks import TASKS
from .dataclass_options import build, takes_fields
from .main import CONTEXT
from .options import Json, Quiet, SpreadingCommand
from .output import bars, console, ending_well, only_json

PANELS = {
    "What is measured": ("tasks", "methods", "ablations", "ratios", "curve_ratios", "lengths", "checkpoints"),
    "On what": ("data_dir", "sources", "haystack", "fraction", "task_fractions", "seed"),
    "How": ("context_length", "target_length", "max_new_tokens", "workers"),
}
FILES = "\n".join(
    f"    {name:12s} {task.file or '(made here)':30s} {task.hub_id or ''}" for name, task in TASKS.items()
)
HELP = f"""Measure a checkpoint: every task in every way, at the same number of slots, so at equal bytes of KV cache.

Predictions, `metrics.json`, plots, `report.html` (one self-contained page) and `report.md` go into a folder of
`--output-dir` that is named by the configuration. A killed run goes on where it was when it is started again.
`scripts/kvpress_baselines.sh` with the same options adds the presses of kvpress.

**Examples**

    semtoken evaluate --checkpoint my-semtoken --data-dir data --workers 2
    semtoken evaluate --checkpoint my-semtoken --data-dir data --fraction 0.02 --lengths 0 --ablations none
    semtoken evaluate --checkpoint my-semtoken --data-dir data --report --update-card my-semtoken

**Tasks**, their files in `--data-dir`, and where the Hub has them:

{FILES}

**Exit codes**: 0 measured; 1 no task has data, or a file is missing; 2 wrong usage; 130 Ctrl-C (start the same command
again to go on).
"""
# Files of the folder, as the record calls them.
NAMES = {"report": "report.html", "report_md": "report.md", "metrics": "metrics.json"}

app = typer.Typer(rich_markup_mode="markdown", add_completion=False)


@app.command(cls=SpreadingCommand, context_settings=CONTEXT, help=HELP)
@takes_fields(EvaluationConfig, PANELS)
def evaluate(
    update_card: Annotated[
        Path | None,
        typer.Option(
            "--update-card",
            metavar="FOLDER",
            help="also put report, figures and plots into this folder and its card, README.md",
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    **given: Any,
) -> None:
    from ..evaluation.evaluate import evaluate
    from ..evaluation.report.card import put_into_card

    with ending_well("start the same command again to go on"), only_json(as_json) as answer, bars(quiet):
        config = build(EvaluationConfig, given)
        if update_card is not None and not (update_card / "README.md").is_file():
            raise FileNotFoundError(f"{update_card} holds no card: write a README.md with the markers of one first")
        folder = evaluate(config)
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        record = {name: folder / file for name, file in NAMES.items()}
        if update_card is not None:
            record["card"] = put_into_card(folder, update_card)
        answer({"folder": folder, **record, **{key: metrics[key] for key in ("cells", "speed", "alarms")}})
        if not as_json:
            show = console()
            for alarm in metrics["alarms"]:
                show.print(f"alarm: {alarm}", style="yellow")
            if update_card is not None:
                show.print(f"card: {record['card']}")
            show.print(f"report: {record['report']}")
