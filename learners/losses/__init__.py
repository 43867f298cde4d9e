"""The objectives: pure functions of log-probs, one small file a family, composed in `objective.py`."""

from __future__ import annotations

from learners.losses.base import LossInput, concatenate
from learners.losses.objective import advance, losses
from learners.losses.registry import LOSSES, STATEFUL
from learners.losses.state import LossState

__all__ = ["LOSSES", "STATEFUL", "LossInput", "LossState", "advance", "concatenate", "losses"]
