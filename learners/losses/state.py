"""What some objectives remember from step to step; saved with the checkpoint, so that a resumed run goes on exactly."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class LossState:
    """Plain numbers; each objective reads and writes its own.

    Example: ``LossState(reward_mean=0.12, rewards_seen=256)``
    """

    reward_mean: float = 0.0
    """BCO: mean of beta h over all completions so far."""
    rewards_seen: int = 0
    """BCO: how many those were."""
    noise: float | None = None
    """LCPO: estimated share of wrong labels; None before the first step, which begins with `loss.label_smoothing`."""
    margins: tuple[float, ...] = ()
    """SPA: the latest margins beta Delta, oldest first."""
    margin_mean: float | None = None
    """Implicit beta: running mean of beta Delta; None before the first step."""
    progress: float = 0.0
    """Share of the iteration's steps taken, in [0, 1]."""
