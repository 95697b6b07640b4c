"""Weights of auxiliary tasks over a run: MT2ST (Liu & Yu 2025, arXiv 2406.18038).

- `fixed`: plain multi-task training.
- `diminish`: the weight decays exponentially, `w0 exp(-rate * progress ** power)`.
- `switch`: the tasks run at full weight up to a scheduled step and are then dropped, and their computation with them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SCHEDULES = ("none", "fixed", "diminish", "switch")


@dataclass(frozen=True)
class TaskSchedule:
    """Weight of the auxiliary tasks as a function of progress.

    Args:
        kind: one of `SCHEDULES`; "none" trains the single task.
        weight: at the start, >= 0.
        rate, power: of the decay.
        switch_at: progress in [0, 1] at which the tasks are dropped.

    Raises:
        ValueError: an argument is out of its range.
    """

    kind: str = "none"
    weight: float = 1.0
    rate: float = 5.0
    power: float = 1.0
    switch_at: float = 0.4

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ValueError(f"the task schedule must be one of {list(SCHEDULES)}, got {self.kind!r}")
        if self.weight < 0 or self.rate < 0 or self.power <= 0 or not 0 <= self.switch_at <= 1:
            raise ValueError(
                "a task schedule needs weight >= 0, rate >= 0, power > 0 and switch_at in [0, 1], got "
                f"{self.weight}, {self.rate}, {self.power}, {self.switch_at}"
            )

    def weight_at(self, progress: float) -> float:
        """Weight at `progress` in [0, 1]; 0 means that the tasks need not be computed."""
        if self.kind == "none":
            return 0.0
        if self.kind == "diminish":
            return self.weight * math.exp(-self.rate * progress**self.power)
        return self.weight if self.kind == "fixed" or progress < self.switch_at else 0.0
