"""The learner as the loop sees it: it trains each batch exactly once and holds what the ledger says, whoever dies.

    plan batches -> [ feed the queue, train, save ] a segment of `learner.checkpoint_steps` batches -> acknowledge it

A segment is the unit that is acknowledged or done again: its checkpoint and its batches count from one transaction on.
A checkpoint is written while the next segment is trained on. When the learner or its queue dies, a learner starts from
the last checkpoint that counts, and what was trained on since is trained on again: in the weights that are kept, each
batch is once.
"""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING, Any, TypeVar

import ray

from conf.objectives import OBJECTIVES
from orchestrator import batching
from orchestrator.accounts import CheckpointRecord
from orchestrator.errors import (
    ActorLostError,
    DeadlineError,
    FailureKind,
    LostObjectError,
    ModelError,
    PoolError,
    TrainingError,
)
from orchestrator.events import Event, EventKind
from orchestrator.queues import BatchQueue
from orchestrator.remote import fetch, fetch_with_progress
from orchestrator.seeds import derive_seed
from orchestrator.waits import Peer, forget, introduce

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from conf.schema import Config
    from orchestrator.accounts import Accounts
    from orchestrator.events import Emit
    from orchestrator.ledger import Ledger
    from orchestrator.store import Store
    from orchestrator.tracking import Tracker
    from orchestrator.types import PreferencePair, UpdateResult

Result = TypeVar("Result")

_PUT_SLICE_S = 1.0  # how long one put waits for room before the learner's health is looked at
_ALIVE_S = 10.0  # a learner that does not even say so within this time is replaced
_FOLDER = "checkpoints"


class Learning:
    """The one learner of a run, and whoever takes its place.

    Args:
        config: of the run.
        run_dir: its folder.
        start: starts a learner's actor.
        ledger: whose transactions make training count.
        accounts: of the ledger.
        store: where batches that were skipped are written.
        tracker: shown how far training is.
        emit: told of deaths, skipped batches and damaged checkpoints.
    """

    def __init__(
        self,
        *,
        config: Config,
        run_dir: Path,
        start: Callable[[], Any],
        ledger: Ledger,
        accounts: Accounts,
        store: Store,
        tracker: Tracker,
        emit: Emit,
    ) -> None:
        self._config = config
        self._run_dir = run_dir
        self._start = start
        self._ledger = ledger
        self._accounts = accounts
        self._store = store
        self._tracker = tracker
        self._emit = emit
        self._restarts_left = config.learner.restarts
        self.version = 0
        """Number of the policy version last published; staleness is counted from it."""
        self.steps = 0
        """Batches of the run that the weights which count contain."""
        self.actor = self._begin()
        self._queue = BatchQueue.create(config.pipeline.queue_capacity)

    def wait_ready(self) -> None:
        """Waits until the learner is up. Raises DeadlineError or ActorLostError: it is not."""
        where = fetch(
            self.actor.where.remote(),
            what="learner: start",
            deadline_s=self._config.learner.start_deadline_s,
            knob="learner.start_deadline_s",
        )
        introduce(Peer(role="learner", name="learner", actor=self.actor, where=where))

    def _begin(self) -> Any:
        actor = self._start()
        introduce(Peer(role="learner", name="learner", actor=actor, where=None))
        return actor

    def _begin_anew(self) -> None:
        forget(self.actor)
        ray.kill(self.actor)
        self.actor = self._begin()
        self.wait_ready()

    def call(self, method: str, *arguments: Any, what: str) -> Any:
        """Calls the learner as the last checkpoint that counts has it; one that dies meanwhile is replaced and asked.

        Raises:
            DeadlineError: no answer within `learner.step_deadline_s`.
            PoolError: the restart budget is used up.
        """
        return self.surviving(lambda: self._ask(method, *arguments, what=what))

    def surviving(self, action: Callable[[], Result]) -> Result:
        """Runs `action`, which needs the learner, again after each death of it, for as long as the budget lasts."""
        while True:
            try:
                return action()
            except (ActorLostError, LostObjectError) as error:
                self._replace(error)

    def restore(self) -> CheckpointRecord | None:
        """Brings the learner to the newest checkpoint that is whole; None: to the initial model.

        A damaged one is reported, and what only it contained is trained on again.

        Raises:
            ActorLostError: the learner died.
        """
        for record in reversed(self._accounts.checkpoints()):
            try:
                self.steps = self._ask(
                    "load", str(self._run_dir / record.path), self.version, what=f"load {record.path}"
                )
            except ModelError as error:
                self._give_up_checkpoint(record, error)
            else:
                return record
        self.steps = 0
        return None

    def _give_up_checkpoint(self, record: CheckpointRecord, error: ModelError) -> None:
        known = self._accounts.checkpoints()
        before = known[known.index(record) - 1] if known.index(record) else None
        good = before.iteration if before else 0
        self._emit(
            Event(
                kind=EventKind.DAMAGED,
                iteration=record.iteration,
                failure=FailureKind.INFRASTRUCTURE,
                text=f"{error} Going on from {before.path if before else 'the initial model'}: what was trained on"
                " since is trained on again.",
            )
        )
        with self._ledger.transaction():
            self._accounts.rewind(before)
            self._ledger.unfinish_iterations(good if before is None or record.iteration > good else good - 1)

    def train(self, iteration: int, pairs: Sequence[PreferencePair]) -> list[UpdateResult]:
        """Trains on the pairs of an iteration, and returns once all of it is on disk.

        Returns:
            What each batch did, those of an earlier process included.

        Raises:
            TrainingError: too many batches had to be skipped; the weights are of no use.
            DeadlineError: a step or a save took too long.
            PoolError: learner or queue died more often than `learner.restarts` allows.
        """
        batches = self._plan(iteration, pairs)
        self._log(iteration, self._accounts.results(iteration))
        self.surviving(lambda: self._train(iteration, batches))
        return self._accounts.results(iteration)

    def _plan(self, iteration: int, pairs: Sequence[PreferencePair]) -> list[list[PreferencePair]]:
        config = self._config
        batches = [
            part
            for epoch in range(config.learner.epochs)
            for part in batching.batches(
                pairs,
                batch_pairs=config.learner.batch_pairs,
                seed=derive_seed(config.seed, "shuffle", iteration),
                epoch=epoch,
                whole_groups=OBJECTIVES[config.loss.name].unit == "group",
            )
        ]
        with self._ledger.transaction():
            self._accounts.plan_batches(iteration, batches)
        return batches

    def _train(self, iteration: int, batches: list[list[PreferencePair]]) -> None:
        """From where the learner is to the last batch; any death on the way is the caller's to mend."""
        done = self._ask("begin_iteration", iteration, len(batches), what="begin the iteration")
        every = self._config.learner.checkpoint_steps
        written: tuple[CheckpointRecord, list[UpdateResult]] | None = None
        while done < len(batches):
            end = min(len(batches), done - done % every + every)
            results = self._segment(iteration, batches, done, end)
            if written:
                self._acknowledge(*written)
            written = (self._save(iteration, end, len(batches), results), results)
            done = end
        if written:
            self._acknowledge(*written)

    def _segment(self, iteration: int, batches: list[list[PreferencePair]], start: int, end: int) -> list[UpdateResult]:
        training = self.actor.train.remote(self._queue, end - start)
        self._feed(iteration, batches, start, end, training)
        try:
            results: list[UpdateResult] = fetch_with_progress(
                training,
                what=f"learner: {end - start} optimizer steps",
                deadline_s=self._config.learner.step_deadline_s * (end - start),
                knob="learner.step_deadline_s",
                on_tick=lambda: self._show(start, len(batches)),
            )
        except TrainingError as error:
            self._report(iteration, error.results, batches)
            raise
        self._report(iteration, results, batches)
        return results

    def _feed(self, iteration: int, batches: list[list[PreferencePair]], start: int, end: int, training: Any) -> None:
        """Puts packed batches into the queue as room appears, and stops as soon as the learner does."""
        deadline_s, loss = self._config.learner.step_deadline_s, self._config.loss
        mismatched = OBJECTIVES[loss.name].mismatched
        for number in range(start, end):
            packed = batching.pack(
                batches[number], number=number, mismatched=mismatched, include_prompt=loss.include_prompt
            )
            self._accounts.issue_batch(iteration, number)
            reference, give_up_at = ray.put(packed), time.monotonic() + deadline_s
            while not self._queue.put(reference, timeout_s=_PUT_SLICE_S):
                self._show(start, len(batches))
                if ray.wait([training], timeout=0)[0]:
                    return
                if time.monotonic() > give_up_at:
                    raise DeadlineError(
                        f"learner: took no batch from the queue within {deadline_s:g} s; raise learner.step_deadline_s"
                        " if a step is really that long, or lower learner.batch_pairs"
                    )

    def _save(self, iteration: int, batches: int, total: int, results: list[UpdateResult]) -> CheckpointRecord:
        """Has the learner copy its state, to be written while it goes on; it counts once it is acknowledged."""
        name = f"iteration-{iteration:04d}" + (f"-batch-{batches:06d}" if batches < total else "")
        self._ask("save", str(self._run_dir / _FOLDER / name), what=f"copy {name}")
        return CheckpointRecord(
            path=f"{_FOLDER}/{name}", iteration=iteration, batches=batches, step=results[-1].step, digest=""
        )

    def _acknowledge(self, record: CheckpointRecord, results: list[UpdateResult]) -> None:
        """Waits until a checkpoint is on disk, and makes it and its batches count; one on the way to it is removed."""
        digest = self._ask("saved", str(self._run_dir / record.path), what=f"write {record.path}")
        record = CheckpointRecord(
            path=record.path,
            iteration=record.iteration,
            batches=record.batches,
            step=record.step,
            digest=digest,
        )
        before = [known for known in self._accounts.checkpoints() if known.iteration == record.iteration]
        with self._ledger.transaction():
            self._accounts.acknowledge(record, results)
            for known in before:
                if known.path != record.path:
                    self._accounts.drop_checkpoint(known.path)
        self.steps = record.step
        self._log(record.iteration, results)
        self.tidy()

    def _log(self, iteration: int, results: Sequence[UpdateResult]) -> None:
        for result in results:
            metrics = {f"step/{name}": value for name, value in result.metrics.items()}
            self._tracker.log(metrics, iteration=iteration, step=result.step)

    def tidy(self) -> None:
        """Removes folders of checkpoints that do not count."""
        kept = {self._run_dir / record.path for record in self._accounts.checkpoints()}
        folder = self._run_dir / _FOLDER
        for path in folder.iterdir() if folder.exists() else ():
            if path not in kept:
                shutil.rmtree(path)

    def _report(
        self, iteration: int, results: Sequence[UpdateResult], batches: Sequence[Sequence[PreferencePair]]
    ) -> None:
        for result in results:
            for note in result.notes:
                self._emit(Event(kind=EventKind.ADAPTED, iteration=iteration, role="learner", text=f"learner: {note}"))
            if result.skipped:
                self._report_skipped(iteration, result, batches[result.batch])

    def _report_skipped(self, iteration: int, result: UpdateResult, pairs: Sequence[PreferencePair]) -> None:
        path = self._store.write_skipped(iteration, result.batch, pairs)
        self._emit(
            Event(
                kind=EventKind.SKIPPED,
                iteration=iteration,
                role="learner",
                failure=FailureKind.DATA,
                text=f"batch {result.batch} of iteration {iteration} left the weights as they were:"
                f" {result.skipped}. Its pairs: {path}",
            )
        )

    def undo(self, iteration: int) -> bool:
        """Takes back what counts of an iteration's training, whose pairs are damaged; False where nothing does."""
        known = self._accounts.checkpoints()
        before = [record for record in known if record.iteration < iteration]
        if before == known:
            return False
        with self._ledger.transaction():
            self._accounts.rewind(before[-1] if before else None)
        self.surviving(self._go_back)
        return True

    def give_up(self, iteration: int) -> None:
        """Rolls the training of an iteration back: the learner is as it was before, and so is what counts."""
        with self._ledger.transaction():
            self._accounts.give_up(iteration)
        self._renew_queue()
        self.surviving(self._go_back)
        self.tidy()

    def _replace(self, error: ActorLostError | LostObjectError) -> None:
        """Has a learner and a queue in place of what died, with the last checkpoint that counts."""
        started = time.monotonic()
        while True:
            if self._restarts_left == 0:
                raise PoolError(
                    f"the learner or its queue died and the restart budget (learner.restarts) is used up. Last words:"
                    f" {error}"
                ) from error
            self._restarts_left -= 1
            self._tell(EventKind.LOST, f"{error} ({self._restarts_left} restarts of the learner left)")
            self._renew_queue()
            try:
                if not self._lives():
                    self._begin_anew()
                came_from = self._go_back()
            except ActorLostError as again:
                error = again
            else:
                seconds = time.monotonic() - started
                self._tell(EventKind.REPLACED, f"learner: goes on from {came_from} after {seconds:.1f} s")
                return

    def _go_back(self) -> str:
        """To the last checkpoint that counts; returns its name.

        Raises:
            PoolError: it is damaged: more than this process knows of has to be done again.
        """
        known = self._accounts.checkpoints()
        if not known:
            self._begin_anew()
            self.steps = 0
            return "the initial model"
        if self.restore() != known[-1]:
            raise PoolError(
                f"{known[-1].path} is damaged, and with it iterations that were finished: stop here, and resume the"
                " run, which does them again from their pairs"
            )
        return known[-1].path

    def _lives(self) -> bool:
        try:
            fetch(self.actor.ready.remote(), what="learner: sign of life", deadline_s=_ALIVE_S, knob="nothing")
        except (ActorLostError, DeadlineError):
            return False
        return True

    def _renew_queue(self) -> None:
        """A queue that knows nothing of batches that were handed out before."""
        self._queue.end()
        self._queue = BatchQueue.create(self._config.pipeline.queue_capacity)

    def _tell(self, kind: EventKind, text: str) -> None:
        self._emit(Event(kind=kind, role="learner", actor="learner", failure=FailureKind.INFRASTRUCTURE, text=text))

    def _show(self, done: int, total: int) -> None:
        self._tracker.progress("train", done + self._ask("progress", what="progress"), total, 0)

    def _ask(self, method: str, *arguments: Any, what: str) -> Any:
        return fetch(
            getattr(self.actor, method).remote(*arguments),
            what=f"learner: {what}",
            deadline_s=self._config.learner.step_deadline_s,
            knob="learner.step_deadline_s",
        )
