"""What a judge is to the rest of the system."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from orchestrator.types import RolloutGroup, ScoredGroup


class Scorer(Protocol):
    """Says how good each completion of a group is, or nothing where it cannot tell."""

    name: str
    """With a version, so that scores of different judges are never taken for one another: `verifier:math@1`."""

    def score(self, group: RolloutGroup) -> ScoredGroup:
        """One score for each completion, in their order. A failure is an abstention, never an invented label."""
