"""Struck while it scores."""

from __future__ import annotations

from typing import Any

import actors.scorer
from tests.chaos.saboteur import register, strike


class ScorerActor(actors.scorer.ScorerActor):
    """See the module."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        register("judge")
        super().__init__(*arguments, **options)

    def score(self, groups: Any) -> Any:
        strike("scoring")
        return super().score(groups)
