"""The collect stage: prompts to preference pairs, by independent samples or by a tree search for each prompt.

SampleCollector    sample K -> judge -> pair the completions
TreeCollector      search a tree of steps -> judge each rollout -> pair the steps (`orchestrator/searching.py`)
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from conf.objectives import takes_sides
from orchestrator.accounts import Accounts
from orchestrator.pairing import make_pairs
from orchestrator.rollouts import Draw, sampling_of
from orchestrator.store import read_rollouts, read_samples
from orchestrator.tally import Tally
from orchestrator.types import sampled_by

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from conf.schema import Config
    from orchestrator.archive import Archive
    from orchestrator.floor import Floor
    from orchestrator.judging import Judge
    from orchestrator.ledger import Ledger
    from orchestrator.rollouts import Rollouts
    from orchestrator.store import Store
    from orchestrator.types import PreferencePair, RolloutGroup, ScoredGroup
    from orchestrator.waves import Wave


@dataclass(frozen=True, kw_only=True, slots=True)
class Collected:
    """What the prompts of a wave came to.

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
    tally: Tally = field(default_factory=Tally)
    """Figures beside those of rollouts, judge and pairs."""
    files: Sequence[Path] = ()
    """What was written of it, to be sealed with the wave."""


class Collector(Protocol):
    """Asks the policy, has its answers judged, and says which is preferred to which."""

    def draw(self, wave: Wave) -> int:
        """Samples what can be before anything is judged; returns how many tokens. Raises AgonError: an actor failed."""

    def collect(self, wave: Wave) -> Collected:
        """The pairs of a wave of prompts. Raises AgonError: an actor or judge failed."""


class SampleCollector:
    """K independent completions a prompt. They are on disk, and count, before they are judged.

    Args:
        config: how they are drawn and paired.
        rollouts: draws them.
        judge: its word makes the pairs.
        store: where they are kept.
        archive: says which samples and scores an earlier attempt at a wave left.
        ledger: whose transaction makes samples count.
        floor: had while the generators are asked.
        quarantined: prompts that were set aside, and why; grows as more are.
    """

    def __init__(
        self,
        config: Config,
        rollouts: Rollouts,
        judge: Judge,
        store: Store,
        archive: Archive,
        ledger: Ledger,
        floor: Floor,
        quarantined: Mapping[str, str],
    ) -> None:
        self._config = config
        self._rollouts = rollouts
        self._judge = judge
        self._store = store
        self._archive = archive
        self._ledger = ledger
        self._floor = floor
        self._quarantined = quarantined

    def draw(self, wave: Wave) -> int:
        """See `Collector.draw`. They are kept on disk, where `collect` finds them."""
        return 0 if self._scored(wave) else self._samples(wave)[1]

    def collect(self, wave: Wave) -> Collected:
        """See `Collector.collect`."""
        scored, tokens = self._scored(wave), 0
        if not scored:
            groups, tokens = self._samples(wave)
            scored = self._judge.score(groups)
            self._store.write_rollouts(wave.iteration, wave.number, scored)
        pairs: list[PreferencePair] = []
        counts: Counter[str] = Counter()
        for group in scored:
            made, count = make_pairs(
                group, self._config.pairing, reference=wave.reference, takes_sides=takes_sides(self._config.loss)
            )
            pairs += made
            counts.update(count.as_dict())
        return Collected(scored=scored, pairs=pairs, counts=counts, tokens=tokens, files=[self._rollouts_of(wave)])

    def _scored(self, wave: Wave) -> list[ScoredGroup]:
        """What an earlier attempt has left of it; nothing where that is not what the wave asks for."""
        path = self._rollouts_of(wave)
        scored = read_rollouts(path) if self._archive.intact(path) else []
        return scored if _were_drawn([one.group for one in scored], wave) else []

    def _rollouts_of(self, wave: Wave) -> Path:
        return self._store.path("rollouts", wave.iteration, wave.number)

    def _samples(self, wave: Wave) -> tuple[list[RolloutGroup], int]:
        """The wave's completions, and the tokens that were sampled for them now."""
        path = self._store.path("samples", wave.iteration, wave.number)
        known = read_samples(path) if self._archive.intact(path) else []
        if _were_drawn(known, wave):
            return known, 0
        generator = self._config.generator
        draw = Draw(
            purpose="rollout",
            iteration=wave.iteration,
            num_samples=generator.samples_per_prompt,
            sampling=sampling_of(generator),
        )
        with self._floor.taken():
            groups = self._rollouts.sample(wave.prompts, [draw])[0]
        self._store.write_samples(wave.iteration, wave.number, groups)
        with self._ledger.transaction():
            self._archive.seal(wave.iteration, [path])
            accounts = Accounts(self._ledger)
            accounts.wave_sampled(wave.iteration, wave.number)
            accounts.quarantine(self._quarantined, wave.iteration)
        return groups, sum(len(completion.token_ids) for group in groups for completion in group.completions)


def _were_drawn(groups: Sequence[RolloutGroup], wave: Wave) -> bool:
    """Whether these are the completions that the wave asks for: of its prompts, by weights that may sample it."""
    of_its_prompts = [group.prompt.id for group in groups] == [prompt.id for prompt in wave.prompts]
    return of_its_prompts and wave.takes(policy.digest for group in groups for policy in sampled_by(group))
