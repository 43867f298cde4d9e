"""Scored groups to preference pairs: who is preferred to whom, and what is left unsaid.

An abstention is no score: its completion enters no pair. Scores closer than `pairing.min_margin` are a tie, and a tie
makes no pair either; it is never decided by position. Where the loss takes sides, a judge that compared the two must
have preferred the one with the higher score: its own tie or its contrary word makes no pair.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import combinations
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from orchestrator.errors import DataError
from orchestrator.seeds import derive_seed
from orchestrator.types import PreferencePair

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from conf.schema import PairingConfig
    from orchestrator.types import Completion, PolicyVersion, ScoredGroup

_TOLERANCE = 1e-9
"""Scores are averages of a few numbers: equal ones may differ by rounding. Absolute below 1, relative above."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairingCounts:
    """What became of one group.

    Example: ``PairingCounts(pairs=1, ties=0, abstentions=2, undecided=0)``
    """

    pairs: int
    ties: int
    """Comparisons the policy looked at and dropped: the margin is no more than `min_margin`, or the scorer said so."""
    abstentions: int
    """Completions without a score."""
    undecided: int = 0
    """Comparisons the policy looked at and dropped because a scorer that compares abstained on them, or contradicts its
    mean scores."""

    def as_dict(self) -> dict[str, int]:
        """Counts by name."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Scored:
    index: int
    score: float
    completion: Completion


def is_tie(first: float, second: float, min_margin: float = 0.0) -> bool:
    """Whether two scores differ by no more than `min_margin`, rounding forgiven."""
    return abs(first - second) <= min_margin + _TOLERANCE * max(1.0, abs(first), abs(second))


def make_pairs(
    scored: ScoredGroup, config: PairingConfig, *, reference: PolicyVersion | None, takes_sides: bool = True
) -> tuple[list[PreferencePair], PairingCounts]:
    """Compares the completions of one prompt, best margins first.

    Which texts are preferred does not depend on the order of the completions: among equal scores a hash of the tokens,
    seeded with the group's seed, decides who comes first.

    Args:
        scored: the group; completions whose score is None are left out.
        config: `best_worst` pairs highest with lowest, then the next ones inwards; `all` pairs every two that differ;
            `length_controlled` pairs the shortest of the near-best with the longest of the near-worst; `best_random`
            pairs the highest with a random lower one.
        reference: the loss reference written into each pair; None: not known yet.
        takes_sides: of the loss; see `conf.objectives.takes_sides`.

    Raises:
        DataError: a score is not finite.
    """
    ranked = _ranked(scored)
    candidates = _candidates(ranked, config, scored.group.seed)
    kept: list[PreferencePair] = []
    ties = undecided = 0
    for best, worst in candidates:
        label = _label(scored, best.index, worst.index)
        if label is None:
            undecided += 1
        elif is_tie(best.score, worst.score, config.min_margin) or (takes_sides and is_tie(label, 0.5)):
            ties += 1
        elif takes_sides and label < 0.5:
            undecided += 1
        elif len(kept) < config.max_pairs:
            kept.append(_pair(scored, best, worst, label, reference))
    abstentions = len(scored.scores) - len(ranked)
    return kept, PairingCounts(pairs=len(kept), ties=ties, abstentions=abstentions, undecided=undecided)


def _ranked(scored: ScoredGroup) -> list[_Scored]:
    """Completions that have a score, highest first."""
    group, found = scored.group, []
    for index, (completion, score) in enumerate(zip(group.completions, scored.scores, strict=True)):
        if score.value is None:
            continue
        if not math.isfinite(score.value):
            raise DataError(
                f"{scored.scorer} gave completion {index} of prompt {group.prompt.id!r} the score {score.value}:"
                " a score must be finite; return None to abstain"
            )
        found.append(_Scored(index, score.value, completion))
    return sorted(found, key=lambda item: (-item.score, _lot(item.completion, group.seed), item.index))


def _lot(completion: Completion, seed: int) -> int:
    """The same for the same tokens wherever they stand in the group, different from seed to seed."""
    return int(xxhash.xxh3_64_intdigest(np.asarray(completion.token_ids, dtype="<i8").tobytes(), seed=seed))


def _candidates(ranked: list[_Scored], config: PairingConfig, seed: int) -> Iterable[tuple[_Scored, _Scored]]:
    match config.policy:
        case "best_worst":
            return _inwards(ranked, config.max_pairs)
        case "length_controlled":
            return _length_controlled(ranked, config.length_control)
        case "best_random":
            return _best_random(ranked, seed)
        case _:
            return _all(ranked)


def _inwards(ranked: list[_Scored], max_pairs: int) -> Iterator[tuple[_Scored, _Scored]]:
    """(1st, last), (2nd, 2nd last), ..."""
    for step in range(min(max_pairs, len(ranked) // 2)):
        yield ranked[step], ranked[-1 - step]


def _best_random(ranked: list[_Scored], seed: int) -> Iterator[tuple[_Scored, _Scored]]:
    """The best against one drawn from those of a lower score; against its equal, a tie, where there is none."""
    lower = [item for item in ranked[1:] if not is_tie(item.score, ranked[0].score)] or ranked[1:]
    if lower:
        yield ranked[0], Random(derive_seed(seed, "best_random")).choice(lower)


def _length_controlled(ranked: list[_Scored], rho: float) -> Iterator[tuple[_Scored, _Scored]]:
    """One pair by the length control of Meta-Rewarding Language Models (Wu et al. 2024, arXiv:2407.19594).

        chosen    the shortest among scores >= (1 - rho) max + rho min
        rejected  the longest among scores <= (1 - rho) min + rho max

    Length is in tokens; among equally long ones the more extreme score is taken.
    """
    if len(ranked) < 2:
        return
    high, low = ranked[0].score, ranked[-1].score
    best_from, worst_to = (1 - rho) * high + rho * low, (1 - rho) * low + rho * high
    best = [item for item in ranked if item.score > best_from or is_tie(item.score, best_from)]
    worst = [item for item in ranked if item.score < worst_to or is_tie(item.score, worst_to)]
    yield (
        min(best, key=lambda item: len(item.completion.token_ids)),
        min(reversed(worst), key=lambda item: -len(item.completion.token_ids)),
    )


def _all(ranked: list[_Scored]) -> Iterable[tuple[_Scored, _Scored]]:
    """Every two, widest margin first."""
    return sorted(combinations(ranked, 2), key=lambda two: two[1].score - two[0].score)


def _pair(
    scored: ScoredGroup, best: _Scored, worst: _Scored, label: float, reference: PolicyVersion | None
) -> PreferencePair:
    group = scored.group
    return PreferencePair(
        id=f"{group.iteration}/{group.prompt.id}/{best.index}>{worst.index}",
        prompt=group.prompt,
        chosen=best.completion,
        rejected=worst.completion,
        chosen_score=best.score,
        rejected_score=worst.score,
        iteration=group.iteration,
        reference=reference,
        scorer=scored.scorer,
        label=label,
    )


def _label(scored: ScoredGroup, chosen: int, rejected: int) -> float | None:
    """What a scorer that compares says of the two, None if it abstained; 1 where completions are judged one by one."""
    return 1.0 if scored.preferences is None else scored.preferences[chosen][rejected]
