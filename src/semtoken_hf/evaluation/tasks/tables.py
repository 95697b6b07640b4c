"""Questions about tables as text: ChartQA's own layout (2203.10244), and WikiTableQuestions (1508.00305)."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..prompts import Example, Prompt
from .base import TaskSettings, TextTask
from .sources import first_of, read_rows

INSTRUCTION = "Answer the question about the table. Only give me the answer and do not output any other words."


@dataclass
class Tables(TextTask):
    """Relaxed accuracy: words must match, numbers may be 5 % off."""

    uses_lm_eval: ClassVar[bool] = True

    def examples(self, source: str, settings: TaskSettings) -> list[Example]:
        folder = Path(source)
        rows = read_chartqa(folder) if folder.is_dir() and list(folder.glob("*.json")) else read_rows(source)
        return [
            Example(
                str(row.get("id", i)),
                f"{INSTRUCTION}\n\n{lines_of(first_of(row, ('table_csv', 'table')))}\n\n",
                f"Question: {row['question']}",
                answers_of(row),
                answer_prefix="\nAnswer:",
            )
            for i, row in enumerate(rows)
        ]

    def score(self, answer: str, prompt: Prompt) -> float:
        from lm_eval.tasks.chartqa.utils import RelaxedCorrectness

        return 100 * RelaxedCorrectness().score(answer.strip(), prompt.answers)


def answers_of(row: dict[str, Any]) -> list[str]:
    """One gold answer: several cells count as one list."""
    answers = first_of(row, ("answers", "answer"))
    return [answers if isinstance(answers, str) else ", ".join(answers)]


def lines_of(table: Any) -> str:
    """A table as text: a row a line, cells between bars. From CSV, or the Hub's header and rows."""
    rows = csv.reader(io.StringIO(table)) if isinstance(table, str) else [table["header"], *table["rows"]]
    return "\n".join(" | ".join(cell.replace("\n", " ") for cell in row) for row in rows)


def read_chartqa(folder: Path) -> list[dict[str, Any]]:
    """A split of ChartQA: JSON lists of {imgname, query, label} beside `tables/NAME.csv`, one for every chart.

    Raises:
        FileNotFoundError: a chart has no table.
    """
    rows = []
    for file in sorted(folder.glob("*.json")):
        for i, item in enumerate(json.loads(file.read_text(encoding="utf-8"))):
            table = folder / "tables" / f"{Path(item['imgname']).stem}.csv"
            if not table.exists():
                raise FileNotFoundError(f"{file.name} asks about {item['imgname']}, but there is no {table}")
            rows.append(
                {
                    "id": f"{file.stem}-{i}",
                    "question": item["query"],
                    "table_csv": table.read_text(encoding="utf-8"),
                    "answers": [item["label"]] if isinstance(item["label"], str) else item["label"],
                }
            )
    return rows
