"""Several judges that must agree; where they do not, nothing is said.

Scores of different judges have different scales and cannot be averaged. What can be is the opinion that each has of two
completions: its own comparison, or the order of its two scores.
"""

from __future__ import annotations

from itertools import combinations
from statistics import fmean
from typing import TYPE_CHECKING

from actors.judges.comparisons import fill_table, mean_wins, opinions, shares_a_side
from actors.judges.reliability import Reliability
from orchestrator.errors import ConfigError
from orchestrator.types import ScoredGroup

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from conf.schema import JudgeConfig
    from orchestrator.judging import Judge
    from orchestrator.tally import Tally
    from orchestrator.types import RolloutGroup


class Ensemble:
    """Compares every two completions by the mean opinion of its members.

    A comparison is undecided unless `min_agreement` of *all* members are on one side (the first, the second or a tie):
    a member that abstains agrees with nobody.

    Args:
        members: the judges by name.
        min_agreement: share of the members, in [0, 1].

    Raises:
        ConfigError: fewer than two members.
    """

    def __init__(self, members: Mapping[str, Judge], min_agreement: float) -> None:
        if len(members) < 2:
            raise ConfigError(f"judge.members={list(members)}: an ensemble needs at least two different judges")
        self._members, self._min_agreement = members, min_agreement
        self._reliability = Reliability()
        self._agreements: list[float] = []

    @property
    def name(self) -> str:
        """See `Judge.name`."""
        return f"ensemble({', '.join(member.name for member in self._members.values())})@1"

    def score(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
        """See `Judge.score`. Scores are mean win rates over the comparisons that were decided."""
        judged = [member.score(groups) for member in self._members.values()]
        scored = [self._merged(group, words) for group, words in zip(groups, zip(*judged, strict=True), strict=True)]
        self._reliability.groups(scored)
        return scored

    def metrics(self) -> Tally:
        """See `Judge.metrics`: the ensemble's own, and those of each member as `judge/<member>_<figure>`."""
        found = self._reliability.report()
        found.mean("judge/ensemble_agreement", self._agreements)
        self._agreements = []
        for kind, member in self._members.items():
            found += member.metrics().renamed("judge/", f"judge/{kind}_")
        return found

    def _merged(self, group: RolloutGroup, words: Sequence[ScoredGroup]) -> ScoredGroup:
        tables = [opinions(scored) for scored in words]
        size = len(group.completions)
        firsts = {pair: self._decide([table[pair] for table in tables]) for pair in combinations(range(size), 2)}
        table = fill_table(size, firsts)
        scores = mean_wins(table, "the judges agree on none of its comparisons")
        return ScoredGroup(group=group, scores=scores, scorer=self.name, preferences=table)

    def _decide(self, firsts: Sequence[float | None]) -> float | None:
        given = [first for first in firsts if first is not None]
        agreement = shares_a_side(given) / len(firsts)
        self._agreements.append(agreement)
        return fmean(given) if given and agreement >= self._min_agreement else None


def build_ensemble(config: JudgeConfig, members: Mapping[str, Judge]) -> Ensemble:
    """The ensemble of these judges, by their kinds, with `judge.min_agreement`."""
    return Ensemble(members, config.min_agreement)
