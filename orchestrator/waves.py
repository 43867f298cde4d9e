"""The collect stage, wave by wave: a wave of prompts is committed as a whole, or done again as a whole.

    issue -> collect (samples are sealed before they are judged) -> filter -> seal all of it in one transaction

Log-probs depend in their last bit on what was decoded together, so what is done again is what was decoded together: the
same prompts with the same seeds under the same weights. A wave that is committed is read back, never drawn or judged
again.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from orchestrator.filters import filter_pairs
from orchestrator.metrics import pair_metrics, rollout_metrics
from orchestrator.store import read_pairs
from orchestrator.tally import Tally
from orchestrator.types import sampled_by

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from conf.schema import FilterConfig
    from orchestrator.accounts import Accounts
    from orchestrator.archive import Archive
    from orchestrator.collecting import Collector
    from orchestrator.judging import Judge
    from orchestrator.ledger import Ledger
    from orchestrator.store import Store
    from orchestrator.types import PolicyVersion, PreferencePair, Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class Wave:
    """Prompts that are sampled, judged and written together.

    Example: ``Wave(iteration=2, number=0, prompts=[...], policies=[versions[1]], reference=versions[1])``
    """

    iteration: int
    number: int
    """Counts the waves of the iteration from 0."""
    prompts: Sequence[Prompt]
    policies: Collection[PolicyVersion] | None
    """The weights that may have sampled it; None: whichever the generators hold, since who may is not known yet."""
    reference: PolicyVersion | None
    """What the pairs will be trained against; None: not known yet."""

    def takes(self, digests: Iterable[str]) -> bool:
        """Whether weights with these digests may have sampled it."""
        return self.policies is None or {policy.digest for policy in self.policies}.issuperset(digests)


@dataclass(frozen=True, kw_only=True, slots=True)
class Harvest:
    """What the waves of an iteration came to."""

    pairs: Sequence[PreferencePair] = ()
    """Those that are trained on."""
    tally: Tally = field(default_factory=Tally)
    tokens: int = 0
    """Sampled for it by this process; what an earlier one had committed is not among them."""
    evicted: int = 0
    """Pairs that had been made already by weights that may not have sampled them, and were made anew."""
    sampled_by: frozenset[str] = frozenset()
    """Digests of the weights that sampled it."""

    def __add__(self, other: Harvest) -> Harvest:
        return Harvest(
            pairs=[*self.pairs, *other.pairs],
            tally=self.tally + other.tally,
            tokens=self.tokens + other.tokens,
            evicted=self.evicted + other.evicted,
            sampled_by=self.sampled_by | other.sampled_by,
        )


class Waves:
    """Collects waves.

    Args:
        collector: makes the pairs of a wave.
        judge: whose word they are; its figures are reported.
        filters: which pairs are kept.
        store: writes records.
        archive: seals their files.
        ledger: whose transactions make a wave count.
        accounts: of the ledger.
        quarantined: prompts that were set aside, and why; grows as more are.
    """

    def __init__(
        self,
        *,
        collector: Collector,
        judge: Judge,
        filters: FilterConfig,
        store: Store,
        archive: Archive,
        ledger: Ledger,
        accounts: Accounts,
        quarantined: Mapping[str, str],
    ) -> None:
        self._collector = collector
        self._judge = judge
        self._filters = filters
        self._store = store
        self._archive = archive
        self._ledger = ledger
        self._accounts = accounts
        self._quarantined = quarantined
        self._drawn: set[tuple[int, int]] = set()
        """Iteration and number of waves that `collect` need not issue again."""

    def draw(self, wave: Wave) -> int:
        """Samples a wave, which `collect` then finds; returns how many tokens that took. Any thread may do it.

        Raises:
            AgonError: see `collect`.
        """
        self._evict(wave)
        if self._committed(wave):
            return 0
        self._issue(wave)
        tokens = self._collector.draw(wave)
        self._drawn.add((wave.iteration, wave.number))
        return tokens

    def collect(self, wave: Wave) -> Harvest:
        """The pairs of a wave, read back where it is committed already.

        Raises:
            AgonError: an actor or judge failed; nothing of it counts but its samples.
        """
        self._evict(wave)
        found = self._committed(wave) or self._collect(wave)
        self._archive.drop(self._store.path("samples", wave.iteration, wave.number))
        return replace(found, evicted=self._accounts.evicted(wave.iteration, wave.number))

    def are_committed(self, waves: Sequence[Wave]) -> bool:
        """Whether nothing of these is left to do."""
        return all(self._committed(wave) for wave in waves)

    def _evict(self, wave: Wave) -> None:
        """Gives up a committed wave that weights sampled which may not have."""
        outcome = self._accounts.wave_outcome(wave.iteration, wave.number)
        if outcome is None or wave.takes(outcome["policies"]):
            return
        with self._ledger.transaction():
            self._accounts.evict_wave(wave.iteration, wave.number)
        for kind in outcome["files"]:
            self._archive.drop(self._store.path(kind, wave.iteration, wave.number))

    def _committed(self, wave: Wave) -> Harvest | None:
        """What was committed of a wave; None where it has to be done."""
        outcome = self._accounts.wave_outcome(wave.iteration, wave.number)
        if outcome is None or not wave.takes(outcome["policies"]):
            return None
        paths = {kind: self._store.path(kind, wave.iteration, wave.number) for kind in outcome["files"]}
        if not all(self._archive.intact(path) for path in paths.values()):
            return None
        return Harvest(
            pairs=read_pairs(paths["pairs"]),
            tally=Tally.load(outcome["tally"]),
            sampled_by=frozenset(outcome["policies"]),
        )

    def _issue(self, wave: Wave) -> None:
        with self._ledger.transaction():
            self._accounts.issue_wave(wave.iteration, wave.number, [prompt.id for prompt in wave.prompts])

    def _collect(self, wave: Wave) -> Harvest:
        if (wave.iteration, wave.number) not in self._drawn:
            self._issue(wave)
        self._drawn.discard((wave.iteration, wave.number))
        collected = self._collector.collect(wave)
        pairs, dropped = filter_pairs(collected.pairs, self._filters)
        files = [*collected.files, self._store.write_pairs(wave.iteration, wave.number, pairs)]
        tally = (
            rollout_metrics(collected.scored)
            + self._judge.metrics()
            + collected.tally
            + pair_metrics(pairs, collected.counts, dropped)
        )
        policies = {policy.digest for scored in collected.scored for policy in sampled_by(scored.group)}
        outcome = {
            "policies": sorted(policies),
            "files": [path.parent.name for path in files],
            "tally": tally.dump(),
        }
        with self._ledger.transaction():
            self._archive.seal(wave.iteration, files)
            self._accounts.wave_scored(wave.iteration, wave.number, collected.scored, outcome)
            self._accounts.accept_pairs(wave.iteration, wave.number, pairs)
            self._accounts.quarantine(self._quarantined, wave.iteration)
        return Harvest(pairs=pairs, tally=tally, tokens=collected.tokens, sampled_by=frozenset(policies))
