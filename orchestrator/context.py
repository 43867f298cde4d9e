"""What every stage of a run shares: the parts, the clock and the token counters."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from orchestrator.seeds import derive_seed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from conf.schema import Config
    from orchestrator.collecting import Collector
    from orchestrator.judging import Judge
    from orchestrator.ledger import Ledger
    from orchestrator.prompts import PromptStream
    from orchestrator.publisher import Publisher
    from orchestrator.rollouts import Roles, Rollouts
    from orchestrator.store import Store
    from orchestrator.tracking import Tracker
    from orchestrator.types import Prompt


@dataclass(kw_only=True, slots=True)
class Context:
    """One run."""

    config: Config
    run_dir: Path
    roles: Roles
    rollouts: Rollouts
    collector: Collector
    """Makes the pairs of an iteration."""
    judge: Judge
    """Its word trains the policy."""
    examiner: Judge
    """Its word is what evaluations report, and trains nothing unless the configuration makes it the judge as well."""
    publisher: Publisher
    prompts: PromptStream
    test_prompts: Sequence[Prompt]
    """Held-out prompts, `evaluation.final_problems` of them or as many as there are."""
    store: Store
    ledger: Ledger
    tracker: Tracker
    steps: int = 0
    """Optimizer steps taken so far."""
    _tokens: int = 0
    _latest: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Seconds and tokens of the latest run of each stage."""

    @contextmanager
    def stage(self, name: str, iteration: int) -> Iterator[None]:
        """Announces a stage, measures it and notes it in the ledger."""
        self.tracker.stage(iteration, name)
        self.ledger.start_phase(iteration, name)
        start, self._tokens = time.monotonic(), 0
        yield
        self._latest[name] = (time.monotonic() - start, self._tokens)
        self.ledger.finish_phase(iteration, name, tokens=self._tokens)

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

    def seed(self, *purpose: str | int) -> int:
        """A seed for one purpose."""
        return derive_seed(self.config.seed, *purpose)

    def checkpoint(self, iteration: int) -> Path:
        """The folder of an iteration's checkpoint."""
        return self.run_dir / "checkpoints" / f"iteration-{iteration:04d}"
