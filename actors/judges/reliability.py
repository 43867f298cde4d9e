"""How far a judge can be trusted: what it says of itself in every iteration, and against a truth where there is one.

All figures are of the judgements since the last report; one that makes no sense (the mean of nothing) is left out.
"""

from __future__ import annotations

import math
from itertools import combinations
from statistics import fmean
from typing import TYPE_CHECKING

from actors.judges.comparisons import opinions, sign_of
from orchestrator.errors import JudgeError
from orchestrator.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from actors.judges.verdicts import Verdict
    from orchestrator.types import ScoredGroup

_BINS = 10
"""Of the calibration error."""
ENOUGH_VOTES = 32
"""From so many on, the share of failures says something of the judge before its iteration is over."""


class Reliability:
    """Collects a judge's verdicts and scored groups between two reports.

    Args:
        max_failed_fraction: of the votes between two reports that may give no verdict; see `JudgeConfig`.
    """

    def __init__(self, max_failed_fraction: float = 1.0) -> None:
        self._max_failed_fraction = max_failed_fraction
        self._start()

    def _start(self) -> None:
        self._readable: list[bool] = []
        self._judge = self._failure = ""
        self._agreements: list[float] = []
        self._orders: list[tuple[float, float]] = []
        self._judged: list[ScoredGroup] = []

    def votes(self, judge: str, readings: Iterable[Sequence[Verdict]]) -> None:
        """Takes the votes of `judge` on some questions.

        Raises:
            JudgeError: of `ENOUGH_VOTES` since the last report, too many gave no verdict.
        """
        self._judge = judge
        for votes in readings:
            values = [vote.value for vote in votes if vote.value is not None]
            self._readable += [vote.value is not None for vote in votes]
            self._failure = next((vote.failure for vote in reversed(votes) if vote.value is None), self._failure)
            if len(values) > 1:
                self._agreements.append(observed_agreement(values))
        if len(self._readable) >= ENOUGH_VOTES:
            self._check_answering()

    def orders(self, shown: float, swapped: float) -> None:
        """Takes one comparison in both orders: each time, the probability that the answer shown first wins."""
        self._orders.append((shown, swapped))

    def groups(self, scored: Iterable[ScoredGroup]) -> None:
        """Takes what became of the groups."""
        self._judged += scored

    def report(self, *, cache_hits: int = 0) -> Tally:
        """The figures under `judge/` since the last report, of whose votes `cache_hits` needed no asking.

        Raises:
            JudgeError: too many of the votes, however few they are, gave no verdict.
        """
        self._check_answering()
        found = group_figures(self._judged)
        found.mean("judge/parse_failure_fraction", (not readable for readable in self._readable))
        found.ratio("judge/cache_hit_fraction", cache_hits, len(self._readable))
        found.mean("judge/vote_agreement", self._agreements)
        found.mean("judge/position_bias", ((shown + swapped) / 2 - 0.5 for shown, swapped in self._orders))
        found.mean(
            "judge/order_agreement",
            (sign_of(shown, 0.5) == sign_of(0.5, swapped) for shown, swapped in self._orders),
        )
        self._start()
        return found

    def _check_answering(self) -> None:
        """Stops a run whose judge says next to nothing that can be used."""
        failed, votes = self._readable.count(False), len(self._readable)
        if failed > self._max_failed_fraction * votes:
            raise JudgeError(
                f"{self._judge} gave no verdict in {failed} of {votes} judgements (judge.max_failed_fraction="
                f"{self._max_failed_fraction:g}). Latest: {self._failure}. Mend the rubric, take an abler judge.model"
                " (a step_judge must have been taught), raise model.max_length where questions are too long and"
                " judge.max_tokens where replies are, or read judge.verdict=probability, which needs no words"
            )


def group_figures(judged: Sequence[ScoredGroup]) -> Tally:
    """Abstentions, ties, the bias for length and the best win rates of scored groups, under `judge/`."""
    found = Tally()
    if not judged:
        return found
    pairs = [(scored, i, j, first) for scored in judged for (i, j), first in opinions(scored).items()]
    decided = [first for *_, first in pairs if first is not None]
    if all(scored.preferences is None for scored in judged):
        found.mean("judge/abstained_fraction", (score.value is None for scored in judged for score in scored.scores))
    else:
        found.mean("judge/abstained_fraction", (first is None for *_, first in pairs))
    found.mean("judge/tie_fraction", (sign_of(first, 0.5) == 0.5 for first in decided))
    sides = [
        (sign_of(first, 0.5) - 0.5) * (sign_of(_length(scored, i), _length(scored, j)) - 0.5)
        for scored, i, j, first in pairs
        if first is not None
    ]
    found.mean("judge/length_bias", (math.copysign(1, side) for side in sides if side))
    best = [rates for scored in judged if (rates := _best_win_rates(scored))]
    found.mean("judge/best_win_rate", (with_self for with_self, _ in best))
    found.mean("judge/best_win_rate_without_self", (without for _, without in best))
    return found


def _best_win_rates(scored: ScoredGroup) -> tuple[float, float] | None:
    """How often the completion with the highest score wins over its group: with its draw with itself, and without.

    None where the judge compared nothing. Of equal scores the one that wins more often counts.
    """
    rates = [
        (score.value, fmean([0.5, *others]), fmean(others))
        for i, (score, row) in enumerate(zip(scored.scores, scored.preferences or (), strict=False))
        if (others := [first for j, first in enumerate(row) if j != i and first is not None])
        and score.value is not None
    ]
    return max(rates)[1:] if rates else None


def _length(scored: ScoredGroup, index: int) -> int:
    return len(scored.group.completions[index].token_ids)


def observed_agreement(values: Sequence[float]) -> float:
    """Share of the pairs of votes on one question that are equal (Fleiss 1971, Psychological Bulletin 76, eq. 2)."""
    return fmean(sign_of(first, second) == 0.5 for first, second in combinations(values, 2))


def truth_figures(judged: Sequence[ScoredGroup], truth: Sequence[ScoredGroup]) -> dict[str, float]:
    """How often the judge orders two completions as the truth does, and whether it is as sure as it is right.

    `judge/accuracy` counts a judge's tie as half right. `judge/calibration_error` is the expected calibration error
    (Guo et al. 2017, arXiv:1706.04599, eq. 3; ten bins) of its probability for the answer that it prefers, left out for
    a judge that orders by scores and gives no probability. Only comparisons that both decide, and that are no tie in
    truth, count; `judge/answered` is the share that the judge decides of those that the truth does.

    Args:
        judged: by the judge.
        truth: the same groups in the same order, scored by a rule or by people.
    """
    asked = 0
    rights: list[float] = []
    sure: list[tuple[float, float]] = []
    for guess, fact in zip(judged, truth, strict=True):
        true = opinions(fact)
        for pair, first in opinions(guess).items():
            actual = true[pair]
            if actual is None or sign_of(actual, 0.5) == 0.5:
                continue
            asked += 1
            if first is None:
                continue
            right = 1 - abs(sign_of(first, 0.5) - sign_of(actual, 0.5))
            rights.append(right)
            if guess.preferences is not None:
                sure.append((max(first, 1 - first), right))
    found = {"judge/answered": len(rights) / asked} if asked else {}
    found |= {"judge/accuracy": fmean(rights)} if rights else {}
    return found | ({"judge/calibration_error": calibration_error(sure)} if sure else {})


def calibration_error(sure: Sequence[tuple[float, float]]) -> float:
    """Mean distance between confidence and share of right answers over bins of confidence, weighted by their sizes.

    Args:
        sure: (confidence in [1/2, 1], 1 where it was right, 0 where not) of each comparison; not empty.
    """
    bins: dict[int, list[tuple[float, float]]] = {}
    for confidence, right in sure:
        bins.setdefault(min(int((confidence - 0.5) * 2 * _BINS), _BINS - 1), []).append((confidence, right))
    gaps = (abs(sum(confidence - right for confidence, right in members)) for members in bins.values())
    return sum(gaps) / len(sure)
