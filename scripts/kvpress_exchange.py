#!/usr/bin/env python
"""Hand prompts to the environment of kvpress, or take its results back; the options are those of evaluate.py.

    python scripts/kvpress_exchange.py export OPTIONS...    # prints the folder that kvpress_run.py reads
    python scripts/kvpress_exchange.py import OPTIONS...    # the results become cells of the evaluation

`scripts/kvpress_baselines.sh` does both, and what lies between.
"""

from __future__ import annotations

import sys

from semtoken_hf.evaluation.cells import Cell, why_not
from semtoken_hf.evaluation.configuration import EvaluationConfig, chosen
from semtoken_hf.evaluation.option_names import DataclassParser
from semtoken_hf.evaluation.press_exchange import export_for_presses, import_press_results
from semtoken_hf.evaluation.tasks import TASKS


def export(config: EvaluationConfig) -> None:
    tasks = []
    for task in chosen(config.tasks, TASKS):
        if reason := why_not(config, Cell(task, "full", None)):
            print(f"left out, {task}: {reason}", file=sys.stderr)
        else:
            tasks.append(task)
    if not tasks:
        raise ValueError("nothing to export: no task has data. Pass --data-dir, or --sources TASK=FILE_OR_HUB_ID")
    print(export_for_presses(config, tasks))


def main() -> None:
    step = sys.argv[1] if len(sys.argv) > 1 else ""
    if step not in ("export", "import"):
        sys.exit(__doc__)
    program = f"kvpress_exchange.py {step}"
    parser = DataclassParser(EvaluationConfig, prog=program, description=__doc__)  # type: ignore[arg-type]
    (config,) = parser.parse_args_into_dataclasses(sys.argv[2:])
    if step == "export":
        export(config)
    else:
        cells = import_press_results(config)
        print(f"{len(cells)} cells of kvpress are in {config.folder}; evaluate.py --report shows them")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
