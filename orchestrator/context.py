"""What every stage of a run shares: the parts, and the clock of each stage."""

from __future__ import annotations

import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from conf.judging import asks_policy
from conf.pipeline import grows_old

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from conf.schema import Config
    from orchestrator.accounts import Accounts
    from orchestrator.archive import Archive
    from orchestrator.events import Emit
    from orchestrator.floor import Floor
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
    from orchestrator.types import PolicyVersion, Prompt
    from orchestrator.waves import Waves


@dataclass(kw_only=True, slots=True)
class Stage:
    """A stage of an iteration, while it runs and afterwards."""

    name: str
    seconds: float = 0.0
    """How long it took."""
    tokens: int = 0
    """Generated for it, or computed by the learner."""
    figures: dict[str, float] = field(default_factory=dict)
    """Those that are all that comes of it; they are kept in the ledger."""

    def metrics(self) -> dict[str, float]:
        """Its seconds, and its tokens per second where it counts them."""
        found = {f"time/{self.name}_s": self.seconds}
        if self.tokens and self.seconds:
            found[f"throughput/{self.name}_tokens_per_s"] = self.tokens / self.seconds
        return found


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
    floor: Floor
    """Had by whoever asks the generators: a wave that is sampled, or an evaluation."""
    bench: Floor
    """Had by whoever asks the judge. Who needs both takes this one first: see `alone`."""
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

    def publish(self, number: int, iteration: int) -> PolicyVersion:
        """`Publisher.publish`; between two waves where the policy's engines judge what they sample, and in sync."""
        with self.floor.taken() if asks_policy(self.config) or not grows_old(self.config) else nullcontext():
            return self.publisher.publish(number, iteration)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Has the generators and the judge to itself."""
        with self.bench.taken(), self.floor.taken():
            yield

    @contextmanager
    def stage(self, name: str, iteration: int, *, quietly: bool = False) -> Iterator[Stage]:
        """Announces a stage unless it runs `quietly` beside another, measures it, and notes it in the ledger."""
        if not quietly:
            self.tracker.stage(iteration, name)
        self.ledger.start_phase(iteration, name)
        stage, start = Stage(name=name), time.monotonic()
        yield stage
        stage.seconds = time.monotonic() - start
        self.ledger.finish_phase(iteration, name, seconds=stage.seconds, tokens=stage.tokens, metrics=stage.figures)
