"""What the paper calls failure, where SemToken shows it: one line for every task or checkpoint and kind of failure."""

from __future__ import annotations

from typing import Any

WORST_COST, WORST_LOSS_OF_SCORE, WORST_ENCODER_SHARE = 0.05, 2.0, 0.30


def find_alarms(cells: list[dict[str, Any]], speed: list[dict[str, Any]]) -> list[str]:
    """The alarms of figures as `metrics.summarise` and `speed.measure_speed` make them."""
    found: dict[tuple[str, str], list[str]] = {}

    def note(subject: str, figure: str, limit: str) -> None:
        found.setdefault((subject, limit), []).append(figure)

    for cell in cells:
        if cell["method"] != "semtoken" or cell["ablation"]:
            continue
        where, ratio = f"{cell['task_title']}, {cell['title']}", cell["ratio"]
        if cell["is_perplexity"] and cell.get("cost", 0) > WORST_COST:
            limit = f"tokens per slot (alarm above +{100 * WORST_COST:g} %)"
            note(f"{where}: perplexity", f"{100 * cell['cost']:+.1f} % at {ratio:g}", limit)
        if cell["metric"] == "F1" and cell.get("score_lost", 0) > WORST_LOSS_OF_SCORE:
            limit = f"tokens per slot (alarm above {WORST_LOSS_OF_SCORE:g})"
            note(f"{where}: points of F1 lost:", f"{cell['score_lost']:.2f} at {ratio:g}", limit)
    for row in speed:
        if row["encoder_share"] > WORST_ENCODER_SHARE:
            limit = f"tokens (alarm above {100 * WORST_ENCODER_SHARE:g} %)"
            figure = f"{100 * row['encoder_share']:.0f} % at {row['length']:,}"
            note(f"{row['title']}: the encoder's share of the latency:", figure, limit)
    return [f"{subject} {', '.join(figures)} {limit}" for (subject, limit), figures in found.items()]
