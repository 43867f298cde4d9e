"""Which batches leave the weights as they are: those whose loss or gradient is not finite or out of all proportion."""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

RECENT = 32
"""Norms of accepted gradients that are remembered."""
_FEWEST = 8
"""Norms of which a median says something."""


def largest_norm(recent: Sequence[float], factor: float) -> float:
    """The largest gradient norm that is accepted: `factor` times the median of recent ones.

    Infinity while there are too few of them, and while most are 0, as those of hinge losses may be.
    """
    middle = median(recent) if len(recent) >= _FEWEST else 0.0
    return factor * middle if middle > 0 else math.inf


def why_skipped(loss: float, norm: float, largest: float) -> str:
    """Why a batch with this loss and gradient norm is skipped; empty: it is not."""
    if not math.isfinite(loss):
        return f"its loss is {loss}"
    if not math.isfinite(norm):
        return f"its gradient norm is {norm}"
    if norm > largest:
        return (
            f"its gradient norm {norm:.3g} exceeds {largest:.3g}, learner.spike_factor times the median of recent ones"
        )
    return ""
