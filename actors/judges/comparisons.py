"""Tables of comparisons: K x K probabilities that one completion is better than another, and scores from them."""

from __future__ import annotations

from itertools import combinations
from statistics import fmean
from typing import TYPE_CHECKING

from orchestrator.pairing import is_tie
from orchestrator.types import Score

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from orchestrator.types import ScoredGroup

    Table = tuple[tuple[float | None, ...], ...]
    """[K][K] as `ScoredGroup.preferences`: [i][j] + [j][i] = 1, the diagonal 1/2, None where nothing was decided."""


def fill_table(size: int, firsts: Mapping[tuple[int, int], float | None]) -> Table:
    """The table of comparisons (i, j) with i < j; those that are not given are undecided."""
    rows: list[list[float | None]] = [[0.5 if i == j else None for j in range(size)] for i in range(size)]
    for (i, j), first in firsts.items():
        rows[i][j] = first
        rows[j][i] = None if first is None else 1 - first
    return tuple(map(tuple, rows))


def mean_wins(table: Table, silence: str) -> tuple[Score, ...]:
    """Each completion's mean probability of winning over those it was compared with.

    Undecided comparisons are left out; a completion none of whose comparisons was decided has no score.

    Args:
        table: comparisons of one group.
        silence: why there is no score, for those.
    """
    scores = []
    for i, row in enumerate(table):
        decided = [first for j, first in enumerate(row) if j != i and first is not None]
        scores.append(Score(value=fmean(decided)) if decided else Score(value=None, reason=silence))
    return tuple(scores)


def opinions(scored: ScoredGroup) -> dict[tuple[int, int], float | None]:
    """What a scorer says of each two completions i < j: its own comparison, else 1, 0 or 1/2 by the order of scores."""
    found: dict[tuple[int, int], float | None] = {}
    for (i, first), (j, second) in combinations(enumerate(scored.scores), 2):
        if scored.preferences is not None:
            found[i, j] = scored.preferences[i][j]
        elif first.value is None or second.value is None:
            found[i, j] = None
        else:
            found[i, j] = sign_of(first.value, second.value)
    return found


def sign_of(first: float, second: float) -> float:
    """1 where the first is larger, 0 where the second is, 1/2 where they are equal up to rounding."""
    return 0.5 if is_tie(first, second) else float(first > second)


def shares_a_side(first: Sequence[float]) -> int:
    """How many of the opinions, each a probability that the first wins, are on the side that most of them are on."""
    sides = [sign_of(value, 0.5) for value in first]
    return max(map(sides.count, sides), default=0)
