"""The figures of an evaluation as a model card carries them: `model-index` metadata and a section between markers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index

from ..files import write_text
from ..tasks import TASKS
from .figures import Figures, finite, methods_only

BEGIN, END = "<!-- evaluation -->", "<!-- /evaluation -->"
# What the Hub calls the metrics of the tasks.
METRIC_TYPES = {
    "F1": "f1",
    "ROUGE-L": "rouge",
    "relaxed accuracy": "relaxed_accuracy",
    "found": "accuracy",
    "official metrics": "longbench_score",
}


def model_index(metrics: Figures, name: str) -> list[dict[str, Any]]:
    """The `model-index` of a card: full context and SemToken at every ratio, in every task.

    Perplexity of texts; score and nats per token of the gold answer of the others. What was not measured, or is not a
    finite number, is left out.
    """
    return eval_results_to_model_index(name, eval_results(metrics))


def eval_results(metrics: Figures) -> list[EvalResult]:
    """What `model_index` is made of; every result's `metric_args` name its method."""
    cells = [c for c in methods_only(metrics) if c["method"] in ("full", "semtoken") and not c.get("checkpoint")]
    results = []
    for cell in cells:
        title, args = cell["title"], {"method": cell["method"]}
        if cell["ratio"] is not None:
            title, args = f"{title} at {cell['ratio']:g} tokens per slot", args | {"tokens_per_slot": cell["ratio"]}
        for kind, name, value in _values(cell):
            results.append(
                EvalResult(
                    task_type="text-generation",
                    task_name=cell["task_title"],
                    dataset_name=cell["task_title"],
                    metric_type=kind,
                    metric_name=f"{name}, {title}",
                    metric_value=round(value, 4),
                    metric_args=args,
                    **_dataset(cell["task"]),
                )
            )
    return results


def update_card(card_path: Path, metrics: Figures, report_md: str) -> None:
    """Put an evaluation into a card's file, as `updated_card` does.

    Raises:
        ValueError: the card lacks the markers.
    """
    text = card_path.read_text(encoding="utf-8")
    write_text(card_path, updated_card(text, metrics, report_md, card_path.resolve().parent.name))


def updated_card(card_text: str, metrics: Figures, report_md: str, name: str) -> str:
    """The text of a card with an evaluation in it: its `model-index`, and the section between the markers.

    The rest stays, results of other evaluations in its `model-index` included.

    Args:
        name: of the model, where the card's `model-index` gives none.

    Raises:
        ValueError: the card lacks the markers.
    """
    card = ModelCard(with_section(card_text, report_md))
    data: Any = card.data
    others = [r for r in data.eval_results or [] if "method" not in (r.metric_args or {})]
    results = [*others, *eval_results(metrics)]
    # The Hub refuses an empty model-index.
    data.model_name = (data.get("model_name") or name) if results else None
    data.eval_results = results or None
    return str(card)


def with_section(card_text: str, section: str) -> str:
    """A card's text with `section` between the markers, in place of what is there.

    Raises:
        ValueError: there is not exactly one of each marker, in this order.
    """
    if card_text.count(BEGIN) != 1 or card_text.count(END) != 1 or card_text.index(BEGIN) > card_text.index(END):
        raise ValueError(f"the card needs the lines {BEGIN} and {END}, once each: the evaluation is put between them")
    before, _, rest = card_text.partition(BEGIN)
    return f"{before}{BEGIN}\n{section.strip()}\n{END}{rest.partition(END)[2]}"


def _values(cell: Figures) -> list[tuple[str, str, float]]:
    """Type, name and value of what a cell has."""
    if cell["is_perplexity"]:
        found = [("perplexity", "perplexity", finite(cell.get("perplexity")))]
    else:
        kind = METRIC_TYPES.get(cell["metric"], cell["metric"].lower().replace(" ", "_"))
        found = [
            (kind, cell["metric"], finite(cell.get("score"))),
            ("nll", "gold answer, nats per token", finite(cell.get("nll"))),
        ]
    return [(kind, name, value) for kind, name, value in found if value is not None]


def _dataset(name: str) -> dict[str, Any]:
    """Where a task's examples are from; tasks on one data set are told apart by the task's name."""
    task = TASKS.get(name)
    if task is None or task.hub_id is None:
        return {"dataset_type": name}
    shared = Counter(t.hub_id for t in TASKS.values())[task.hub_id] > 1
    config = name if shared else task.hub_name
    return {"dataset_type": task.hub_id} | ({"dataset_config": config} if config else {})
