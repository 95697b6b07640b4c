"""What the paper calls failure, where SemToken shows it: one line for every task or checkpoint and kind of failure."""

from __future__ import annotations

from typing import Any

WORST_COST, WORST_LOSS_OF_SCORE, WORST_ENCODER_SHARE = 0.05, 2.0, 0.30


def find_alarms(cells: list[dict[str, Any]], speed: list[dict[str, Any]]) -> list[str]:
    """The alarms of figures as `metrics.summarise` and `speed.measure_speed` make them."""
    found: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        if cell["method"] != "semtoken" or cell["ablation"]:
            continue
        where = f"{cell['task_title']}, {cell['title']}"
        if cell["is_perplexity"] and cell.get("cost", 0) > WORST_COST:
            limit = f"tokens per slot (alarm above +{100 * WORST_COST:g} %)"
            found.setdefault((f"{where}: perplexity", limit), []).append(
                f"{100 * cell['cost']:+.1f} % at {cell['ratio']:g}"
            )
        if cell["metric"] == "F1" and cell.get("score_lost", 0) > WORST_LOSS_OF_SCORE:
            limit = f"tokens per slot (alarm above {WORST_LOSS_OF_SCORE:g})"
            found.setdefault((f"{where}: points of F1 lost:", limit), []).append(
                f"{cell['score_lost']:.2f} at {cell['ratio']:g}"
            )
    for row in speed:
        if row["encoder_share"] > WORST_ENCODER_SHARE:
            limit = f"tokens (alarm above {100 * WORST_ENCODER_SHARE:g} %)"
            found.setdefault((f"{row['title']}: the encoder's share of the latency:", limit), []).append(
                f"{100 * row['encoder_share']:.0f} % at {row['length']:,}"
            )
    return [f"{where} {', '.join(figures)} {limit}" for (where, limit), figures in found.items()]
