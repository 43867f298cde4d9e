"""Scalars of an iteration, reduced once. Names, units and meanings: docs/metrics.md."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from statistics import NormalDist, fmean
from typing import TYPE_CHECKING

from orchestrator.pairing import is_tie
from orchestrator.tally import Tally
from orchestrator.types import FinishReason

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from orchestrator.types import PreferencePair, ScoredGroup, UpdateResult

_LOST = ("ties", "abstentions", "undecided")
"""Comparisons that make no pair, as `PairingCounts` has them."""
ROLLED_BACK = "promotion/rolled_back"
"""1 in the metrics of an iteration whose weights were given up, else 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """A share of solved problems with its 95 % Wilson interval, as read back from `eval/` metrics.

    Example: ``Accuracy(value=0.41, low=0.38, high=0.44, n=1024)``
    """

    value: float
    low: float
    high: float
    n: int | None
    """Problems; None where it was not logged."""


def read_accuracy(metrics: Mapping[str, float], kind: str) -> Accuracy | None:
    """The accuracy of one kind (`greedy` or `sampled`) among the metrics of an iteration; None without evaluation."""
    name = f"eval/{kind}"
    if f"{name}_value" not in metrics:
        return None
    n = metrics.get(f"{name}_n")
    return Accuracy(
        value=metrics[f"{name}_value"],
        low=metrics[f"{name}_low"],
        high=metrics[f"{name}_high"],
        n=None if n is None else int(n),
    )


def wilson_interval(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (1927; Brown, Cai & DasGupta 2001, eq. 4), within [0, 1].

    Args:
        successes: how many of `n`; scores between 0 and 1 may add up to a fraction, for which it is conservative.
        n: independent trials; 0 gives (0, 1), which is what is known then.
        confidence: two-sided.

    Raises:
        ValueError: `successes` is not in [0, n].
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / n
    center = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # The ends are exact in exact arithmetic: rounding must not cut 0 out of (0, n) or 1 out of (n, n).
    low = 0.0 if successes == 0 else max(0.0, (center - spread) / scale)
    high = 1.0 if successes == n else min(1.0, (center + spread) / scale)
    return low, high


def rollout_metrics(groups: Sequence[ScoredGroup]) -> Tally:
    """`rollout/`: what was sampled and how it was judged, before any filter."""
    found = Tally()
    completions = [completion for scored in groups for completion in scored.group.completions]
    if not completions:
        return found
    given = [[score.value for score in scored.scores if score.value is not None] for scored in groups]
    scores = [value for values in given for value in values]
    comparisons = [is_tie(*two) for values in given for two in combinations(values, 2)]
    lengths = [len(completion.token_ids) for completion in completions]
    found.sum("rollout/completions", len(completions))
    found.sum("rollout/tokens", sum(lengths))
    found.mean("rollout/length_mean", lengths)
    found.max("rollout/length_max", max(lengths))
    truncated = (completion.finish_reason is FinishReason.LENGTH for completion in completions)
    found.mean("rollout/truncated_fraction", truncated)
    found.ratio("rollout/abstained_fraction", len(completions) - len(scores), len(completions))
    found.mean("rollout/all_same_fraction", (not values or is_tie(min(values), max(values)) for values in given))
    found.mean("rollout/score_mean", scores)
    found.mean("rollout/tie_fraction", comparisons)
    return found


def pair_metrics(pairs: Sequence[PreferencePair], counts: Mapping[str, int], dropped: Mapping[str, int]) -> Tally:
    """`pairs/`: what was made of the scores.

    Args:
        pairs: those that are kept.
        counts: sums of `PairingCounts.as_dict()` over the groups.
        dropped: reasons of `filter_pairs` and how often each applied.
    """
    found = Tally()
    for name in _LOST:
        found.sum(f"pairs/{name}", counts.get(name, 0))
    found.sum("pairs/made", counts.get("pairs", 0))
    found.sum("pairs/kept", len(pairs))
    for reason, count in dropped.items():
        found.sum(f"pairs/dropped_{reason}", count)
    found.mean("pairs/margin_mean", (pair.margin for pair in pairs))
    found.mean("pairs/length_chosen_mean", (len(pair.chosen.token_ids) for pair in pairs))
    found.mean("pairs/length_rejected_mean", (len(pair.rejected.token_ids) for pair in pairs))
    return found


def why_no_pairs(found: Mapping[str, float]) -> str:
    """What `pair_metrics` tells of comparisons that made no pair, for people: ``128 ties``."""
    reasons = {name.removeprefix("pairs/"): count for name, count in found.items() if name.startswith("pairs/")}
    lost = [name for name in reasons if name in _LOST or name.startswith("dropped_")]
    return ", ".join(f"{reasons[name]:.0f} {name.replace('_', ' ')}" for name in lost if reasons[name]) or "no scores"


def update_metrics(results: Sequence[UpdateResult]) -> dict[str, float]:
    """`train/`: the optimizer steps of an iteration as one figure each.

    Names that end in `_max` are reduced by their maximum, `lr` by its last value, everything else by the mean over
    pairs. A metric that only some steps report is reduced over those; figures of a skipped batch that are not finite
    are not reported.
    """
    if not results:
        return {}
    found = {
        "steps": float(len(results)),
        "pairs": float(sum(len(result.pair_ids) for result in results)),
        "tokens": float(sum(result.tokens for result in results)),
    }
    for name in dict.fromkeys(name for result in results for name in result.metrics):
        reported = [result for result in results if _reports(result, name)]
        if reported:
            found[name] = _reduce(name, [(result.metrics[name], len(result.pair_ids)) for result in reported])
    return _under("train", found)


def _reports(result: UpdateResult, name: str) -> bool:
    return name in result.metrics and (not result.skipped or math.isfinite(result.metrics[name]))


def _reduce(name: str, weighted: Sequence[tuple[float, int]]) -> float:
    values = [value for value, _ in weighted]
    if name.endswith("_max"):
        return max(values)
    if name == "lr":
        return values[-1]
    return _weighted_mean(weighted)


def _weighted_mean(weighted: Iterable[tuple[float, int]]) -> float:
    values, weights = zip(*weighted, strict=True)
    return fmean(values, weights)


def _under(namespace: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"{namespace}/{name}": value for name, value in metrics.items()}
