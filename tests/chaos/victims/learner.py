"""Struck between gradient and step, and while a checkpoint is written."""

from __future__ import annotations

from typing import Any

import torch

import learners.checkpoint
import learners.learner
from tests.chaos.saboteur import register, strike


class Learner(learners.learner.Learner):
    """See the module."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        register("learner")
        super().__init__(*arguments, **options)
        take, seal = torch.optim.AdamW.step, learners.checkpoint._seal

        def step(optimizer: Any, *rest: Any) -> Any:
            strike("optimizer step")
            return take(optimizer, *rest)

        def half_written(*rest: Any) -> Any:
            strike("checkpoint")
            return seal(*rest)

        torch.optim.AdamW.step = step
        learners.checkpoint._seal = half_written
