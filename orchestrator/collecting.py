"""The collect stage: prompts to preference pairs, by independent samples or by a tree search for each prompt.

SampleCollector    sample K -> judge -> pair the completions
TreeCollector      search a tree of steps -> judge each rollout -> pair the steps (`orchestrator/searching.py`)
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from conf.objectives import takes_sides
from orchestrator.pairing import make_pairs
from orchestrator.rollouts import Draw, sampling_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from conf.schema import Config
    from orchestrator.judging import Judge
    from orchestrator.rollouts import Rollouts
    from orchestrator.store import Store
    from orchestrator.types import PolicyVersion, PreferencePair, Prompt, ScoredGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class Collected:
    """What the prompts of an iteration came to.

    Example: ``Collected(scored=[...], pairs=[...], counts=Counter(ties=12), tokens=40_960)``
    """

    scored: Sequence[ScoredGroup]
    """Every rollout with its score."""
    pairs: Sequence[PreferencePair]
    """Before any filter."""
    counts: Counter[str]
    """What became of comparisons that made no pair."""
    tokens: int
    """Sampled for it."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Beside those of rollouts and judge."""


class Collector(Protocol):
    """Asks the policy, has its answers judged, and says which is preferred to which."""

    def collect(self, prompts: Sequence[Prompt], iteration: int, reference: PolicyVersion) -> Collected:
        """The pairs of one iteration, trained against `reference`. Raises AgonError: an actor or judge failed."""


class SampleCollector:
    """K independent completions a prompt.

    Args:
        config: how they are drawn and paired.
        rollouts: draws them.
        judge: its word makes the pairs.
        store: where they are kept.
    """

    def __init__(self, config: Config, rollouts: Rollouts, judge: Judge, store: Store) -> None:
        self._config = config
        self._rollouts = rollouts
        self._judge = judge
        self._store = store

    def collect(self, prompts: Sequence[Prompt], iteration: int, reference: PolicyVersion) -> Collected:
        """See `Collector.collect`."""
        generator = self._config.generator
        draw = Draw(
            purpose="rollout",
            iteration=iteration,
            num_samples=generator.samples_per_prompt,
            sampling=sampling_of(generator),
        )
        groups = self._rollouts.sample(prompts, [draw])[0]
        scored = self._judge.score(groups)
        self._store.write_rollouts(iteration, scored)
        pairs: list[PreferencePair] = []
        counts: Counter[str] = Counter()
        for group in scored:
            made, count = make_pairs(
                group, self._config.pairing, reference=reference, takes_sides=takes_sides(self._config.loss)
            )
            pairs += made
            counts.update(count.as_dict())
        tokens = sum(len(completion.token_ids) for group in groups for completion in group.completions)
        return Collected(scored=scored, pairs=pairs, counts=counts, tokens=tokens)
