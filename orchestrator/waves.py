"""The collect stage, wave by wave: a wave of prompts is committed as a whole, or done again as a whole.

    issue -> collect (samples are sealed before they are judged) -> filter -> seal all of it in one transaction

Log-probs depend in their last bit on what was decoded together, so what is done again is what was decoded together: the
same prompts with the same seeds under the same weights. A wave that is committed is read back, never drawn or judged
again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.filters import filter_pairs
from orchestrator.metrics import pair_metrics, rollout_metrics
from orchestrator.store import read_pairs
from orchestrator.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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

    Example: ``Wave(iteration=2, number=0, prompts=[...], policy=versions[1], reference=versions[1])``
    """

    iteration: int
    number: int
    """Counts the waves of the iteration from 0."""
    prompts: Sequence[Prompt]
    policy: PolicyVersion
    """The weights that generators hold."""
    reference: PolicyVersion
    """What the pairs will be trained against."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Harvest:
    """What the waves of an iteration came to."""

    pairs: Sequence[PreferencePair]
    """Those that are trained on."""
    tally: Tally
    tokens: int
    """Sampled for it by this process; what an earlier one had committed is not among them."""


class Waves:
    """Collects the waves of an iteration.

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

    def collect(self, waves: Sequence[Wave]) -> Harvest:
        """The pairs of an iteration.

        Raises:
            AgonError: an actor or judge failed; the waves before stay committed.
        """
        pairs: list[PreferencePair] = []
        tally, tokens = Tally(), 0
        for wave in waves:
            found = self._committed(wave)
            if found is None:
                made, counted, sampled = self._collect(wave)
                tokens += sampled
            else:
                made, counted = found
            self._archive.drop(self._store.path("samples", wave.iteration, wave.number))
            pairs += made
            tally += counted
        return Harvest(pairs=pairs, tally=tally, tokens=tokens)

    def are_committed(self, waves: Sequence[Wave]) -> bool:
        """Whether nothing of these is left to do."""
        return all(self._committed(wave) for wave in waves)

    def _committed(self, wave: Wave) -> tuple[list[PreferencePair], Tally] | None:
        """What was committed of a wave by an earlier process; None where it has to be done."""
        outcome = self._accounts.wave_outcome(wave.iteration, wave.number)
        if outcome is None:
            return None
        paths = {kind: self._store.path(kind, wave.iteration, wave.number) for kind in outcome["files"]}
        if outcome["policy"] != wave.policy.digest:
            for path in paths.values():
                self._archive.drop(path)
            return None
        if not all(self._archive.intact(path) for path in paths.values()):
            return None
        return read_pairs(paths["pairs"]), Tally.load(outcome["tally"])

    def _collect(self, wave: Wave) -> tuple[list[PreferencePair], Tally, int]:
        with self._ledger.transaction():
            self._accounts.issue_wave(wave.iteration, wave.number, [prompt.id for prompt in wave.prompts])
        collected = self._collector.collect(wave)
        pairs, dropped = filter_pairs(collected.pairs, self._filters)
        files = [*collected.files, self._store.write_pairs(wave.iteration, wave.number, pairs)]
        tally = (
            rollout_metrics(collected.scored)
            + self._judge.metrics()
            + collected.tally
            + pair_metrics(pairs, collected.counts, dropped)
        )
        outcome = {
            "policy": wave.policy.digest,
            "files": [path.parent.name for path in files],
            "tally": tally.dump(),
        }
        with self._ledger.transaction():
            self._archive.seal(wave.iteration, files)
            self._accounts.wave_scored(wave.iteration, wave.number, collected.scored, outcome)
            self._accounts.accept_pairs(wave.iteration, wave.number, pairs)
            self._accounts.quarantine(self._quarantined, wave.iteration)
        return pairs, tally, collected.tokens
