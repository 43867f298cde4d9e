"""Whether two models rank the same answers alike: how far CREAM believes its own labels.

Wang et al. 2024, "CREAM: Consistency Regularized Self-Rewarding Language Models" (arXiv:2410.12735), section 4: the
label of a pair is C = (tau + 1) / 2, with Kendall's tau between the rankings of a prompt's answers by the policy and by
the one before it. With `loss.labels=soft` that is their objective, C times DPO plus (1 - C) times DPO the other way.
"""

from __future__ import annotations

from itertools import combinations
from statistics import fmean
from typing import TYPE_CHECKING

from actors.judges.comparisons import fill_table, sign_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from actors.judges.comparisons import Table


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Concordant minus discordant comparisons as a share of all, in [-1, 1]; one that is a tie in either is neither.

    Args:
        first: scores of at least two answers.
        second: other scores of the same answers.
    """
    places = combinations(range(len(first)), 2)
    return fmean(_side(first[i], first[j]) * _side(second[i], second[j]) for i, j in places)


def consistency(tau: float) -> float:
    """C in [0, 1] from Kendall's tau."""
    return (tau + 1) / 2


def consistent_table(scores: Sequence[float | None], label: float) -> Table:
    """Comparisons of one group: `label` for the answer of the higher score, 1/2 between equals."""
    firsts: dict[tuple[int, int], float | None] = {}
    for (i, first), (j, second) in combinations(enumerate(scores), 2):
        if first is None or second is None:
            firsts[i, j] = None
        else:
            firsts[i, j] = 0.5 + (label - 0.5) * _side(first, second)
    return fill_table(len(scores), firsts)


def _side(first: float, second: float) -> float:
    """1 where the first is larger, -1 where the second is, 0 where they are equal."""
    return 2 * sign_of(first, second) - 1
