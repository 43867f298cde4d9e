"""What every stage of a run shares: the parts, the clock and the token counters."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from conf.schema import Config
    from orchestrator.accounts import Accounts
    from orchestrator.archive import Archive
    from orchestrator.events import Emit
    from orchestrator.judging import Judge
    from orchestrator.learning import Learning
    from orchestrator.ledger import Ledger
    from orchestrator.profiling import Profile
    from orchestrator.prompts import PromptStream
    from orchestrator.publisher import Publisher
    from orchestrator.rollouts import Rollouts
    from orchestrator.store import Store
    from orchestrator.tracking import Tracker
    from orchestrator.training import Training
    from orchestrator.types import Prompt
    from orchestrator.waves import Waves


@dataclass(kw_only=True, slots=True)
class Context:
    """One run."""

    config: Config
    run_dir: Path
    rollouts: Rollouts
    waves: Waves
    """Make the pairs of an iteration."""
    judge: Judge
    """Its word trains the policy."""
    examiner: Judge
    """Its word is what evaluations report, and trains nothing unless the configuration makes it the judge as well."""
    publisher: Publisher
    learning: Learning
    training: Training
    prompts: PromptStream
    test_prompts: Sequence[Prompt]
    """Held-out prompts, `evaluation.final_problems` of them or as many as there are."""
    store: Store
    archive: Archive
    ledger: Ledger
    accounts: Accounts
    tracker: Tracker
    profile: Profile
    emit: Emit
    _tokens: int = 0
    _latest: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Seconds and tokens of the latest run of each stage."""

    @contextmanager
    def stage(self, name: str, iteration: int) -> Iterator[dict[str, float]]:
        """Announces a stage, measures it and notes it in the ledger, with the figures put into what it gives."""
        self.tracker.stage(iteration, name)
        self.ledger.start_phase(iteration, name)
        start, self._tokens = time.monotonic(), 0
        found: dict[str, float] = {}
        yield found
        seconds = time.monotonic() - start
        self._latest[name] = (seconds, self._tokens)
        self.ledger.finish_phase(iteration, name, seconds=seconds, tokens=self._tokens, metrics=found)

    def count_tokens(self, count: int) -> None:
        """Adds to the tokens, generated or computed by the learner, of the stage that runs."""
        self._tokens += count

    def stage_metrics(self) -> dict[str, float]:
        """Seconds, and tokens per second, of the latest run of each finished stage."""
        found = {f"time/{name}_s": elapsed for name, (elapsed, _) in self._latest.items()}
        for name, (elapsed, count) in self._latest.items():
            if count:
                found[f"throughput/{name}_tokens_per_s"] = count / elapsed
        return found
