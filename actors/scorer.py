"""The scorer: a Ray actor around a judge."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from actors.judges import build_scorer
from orchestrator.stacks import Observable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from conf.schema import JudgeConfig, ScorerConfig
    from orchestrator.types import RolloutGroup, ScoredGroup


class ScorerActor(Observable):
    """Scores groups, one after the other. With ``max_concurrency=2`` it can be observed meanwhile."""

    def __init__(self, name: str, config: ScorerConfig, judge: JudgeConfig) -> None:
        self.name = name
        self._busy = threading.Lock()
        self._scorer = build_scorer(config, judge)

    def score(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
        """One scored group for each group, in order."""
        with self._busy, self.spans.during("score"):
            return [self._scorer.score(group) for group in groups]

    def ready(self) -> int:
        """The process id, once the judge is built."""
        return os.getpid()
