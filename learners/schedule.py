"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math


def learning_rate(*, peak: float, schedule: str, step: int, total_steps: int, warmup_steps: int) -> float:
    """Linear warm-up to `peak`, then constant, or falling to zero just after the last step.

    Args:
        peak: highest learning rate.
        schedule: "constant", "linear" or "cosine".
        step: step within the iteration that is about to be taken, 0 for the first.
        total_steps: steps of the iteration, at least 1; later steps keep the last step's rate.
        warmup_steps: the first so many steps take 1/(w+1), 2/(w+1), ... of the peak.

    Raises:
        ValueError: an unknown schedule.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    done = min(step, total_steps - 1) - warmup_steps
    progress = max(0.0, done / max(1, total_steps - warmup_steps))
    match schedule:
        case "constant":
            return peak
        case "linear":
            return peak * (1 - progress)
        case "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * progress))
        case _:
            raise ValueError(f"schedule is {schedule!r}; it must be constant, linear or cosine")
