"""The train stage: an iteration's pairs to optimizer steps, each batch exactly once.

    plan batches -> [ feed the queue, train, save ] a segment of `learner.checkpoint_steps` batches -> acknowledge it
      ^ pairs, all at once or (`pipeline.mode=semi_online`) wave by wave

A segment is the unit that is acknowledged or done again: its checkpoint and its batches count from one transaction on.
A checkpoint is written while the next segment is trained on; that of the last one, while the weights are published and
tried and the next pairs are collected (`settle`).
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import ray

from conf.objectives import OBJECTIVES
from conf.pipeline import grows_old
from orchestrator import batching
from orchestrator.accounts import CheckpointRecord
from orchestrator.batch_plan import BatchPlan
from orchestrator.errors import DeadlineError, FailureKind, TrainingError
from orchestrator.events import Event, EventKind
from orchestrator.learning import FOLDER
from orchestrator.remote import fetch_with_progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from conf.schema import Config
    from orchestrator.accounts import Accounts
    from orchestrator.events import Emit
    from orchestrator.learning import Learning
    from orchestrator.ledger import Ledger
    from orchestrator.store import Store
    from orchestrator.tracking import Tracker
    from orchestrator.types import PreferencePair, UpdateResult

_PUT_SLICE_S = 1.0  # how long one put waits for room before the learner's health is looked at


class Training:
    """Trains the learner of a run, one iteration after the other.

    Args:
        config: of the run.
        run_dir: its folder.
        learning: the learner, and whoever takes its place.
        ledger: whose transactions make training count.
        accounts: of the ledger.
        store: where batches that were skipped are written.
        tracker: shown how far training is, and told what each step did.
        emit: told of skipped batches and of what the learner changed to go on.
    """

    def __init__(
        self,
        *,
        config: Config,
        run_dir: Path,
        learning: Learning,
        ledger: Ledger,
        accounts: Accounts,
        store: Store,
        tracker: Tracker,
        emit: Emit,
    ) -> None:
        self._config = config
        self._run_dir = run_dir
        self._learning = learning
        self._ledger = ledger
        self._accounts = accounts
        self._store = store
        self._tracker = tracker
        self._emit = emit
        self._written: tuple[CheckpointRecord, list[UpdateResult]] | None = None
        """What is being written, and what its batches did."""
        self._logged = (0, 0)
        """An iteration, and how many of its batches the tracker was told of."""
        # Those that queue and learner may still have. Where the owner of an object lets go of it before others that got
        # it one from another, Ray keeps a little memory of it for ever.
        self._handed_out: deque[Any] = deque(maxlen=2 * config.pipeline.queue_capacity + 2)
        asked = config.reference.logprobs
        self._sampled_reference = asked == "sampled" or (asked == "auto" and config.model.dtype == "float32")

    def run(self, iteration: int, pairs: Iterator[Sequence[PreferencePair]]) -> list[UpdateResult]:
        """Trains on the pairs of an iteration, and returns while the last of it is written to disk: see `settle`.

        Args:
            iteration: its number.
            pairs: in parts; they are asked for one by one as the learner gets there, where it need not know before how
                many steps there will be (`pipeline.mode=semi_online`).

        Returns:
            What each batch did, those of an earlier process included; nothing where there is no pair.

        Raises:
            TrainingError: too many batches had to be skipped; the weights are of no use.
            DeadlineError: a step or a save took too long.
            PoolError: learner or queue died more often than `learner.restarts` allows.
        """
        plan = BatchPlan(self._config, iteration, pairs, self._note_plan)
        if self._config.pipeline.mode != "semi_online":
            plan.complete()
        self._log(iteration, self._accounts.results(iteration))
        if plan.batches or plan.more():
            self._learning.move()
            try:
                self._learning.surviving(lambda: self._train(iteration, plan), anew=True)
            except TrainingError:
                plan.complete()  # all its pairs are accounted for: in batches that are rolled back
                raise
        return [*self._accounts.results(iteration), *(self._written[1] if self._written else ())]

    def settle(self) -> None:
        """Waits until all that was trained on is on disk, from when on it counts.

        Raises:
            DeadlineError: the disk takes too long.
            PoolError: the learner died more often than `learner.restarts` allows.
            UnsettledError: it died: the iteration is to be trained again.
        """
        self._learning.surviving(self._settle)

    def give_up(self, iteration: int) -> None:
        """What an iteration was trained on is in no weights any more."""
        if self._written:
            self._log(iteration, self._written[1])
            self._written = None
        self._learning.give_up(iteration)

    def _settle(self) -> None:
        if self._written:
            self._acknowledge(*self._written)
            self._written = None
        self._learning.is_ahead = False

    def _note_plan(self, iteration: int, batches: Sequence[Sequence[PreferencePair]]) -> None:
        with self._ledger.transaction():
            self._accounts.plan_batches(iteration, batches)

    def _train(self, iteration: int, plan: BatchPlan) -> None:
        """From what is acknowledged to the last batch; any death on the way is the caller's to mend."""
        batches, every = plan.batches, self._config.learner.checkpoint_steps
        total = len(batches) if plan.is_complete else 0
        self._written = None  # of a learner that died meanwhile
        version = self._learning.version
        done = self._learning.ask("begin_iteration", iteration, total, version, what="begin the iteration")
        start = len(self._accounts.results(iteration))
        while plan.reaches(start):
            # A learner that outlived its queue may be ahead, and what is saved is where it is.
            end = max(done, min(len(batches), start - start % every + every))
            results = self._segment(iteration, batches, start, end)
            self._settle()
            is_last = plan.is_complete and end == len(batches)
            self._written = (self._save(iteration, end, results, is_last=is_last), results)
            start = end
        self._learning.is_ahead = self._written is not None

    def _segment(self, iteration: int, batches: list[list[PreferencePair]], start: int, end: int) -> list[UpdateResult]:
        self._ledger.forget_measurements(iteration)  # of other weights
        acknowledged = len(self._accounts.results(iteration))
        training = self._learning.actor.train.remote(self._learning.queue, start, end, acknowledged=acknowledged)
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
        """Puts packed batches into the queue as room appears, and stops as soon as the learner does.

        The first at once, since it is waited for, and then several in a call; they are packed while those before are
        handed over.
        """
        loss, queue, show = self._config.loss, self._learning.queue, partial(self._show, start, len(batches))
        packed_ones: list[Any] = []
        before: tuple[list[Any], Any] | None = None
        mismatched = OBJECTIVES[loss.name].mismatched
        for number in range(start, end):
            packed = batching.pack(
                batches[number],
                number=number,
                mismatched=mismatched,
                include_prompt=loss.include_prompt,
                sampled_reference=self._sampled_reference,
                stale=grows_old(self._config) and loss.importance_clip > 1,
            )
            self._accounts.issue_batch(iteration, number)
            reference = ray.put(packed)
            self._handed_out.append(reference)
            packed_ones.append(reference)
            if len(packed_ones) < queue.at_once and start < number < end - 1:
                continue
            if before and not self._are_taken(*before, training, show):
                return
            before, packed_ones = (packed_ones, queue.offer(packed_ones, timeout_s=_PUT_SLICE_S)), []
        if before:
            self._are_taken(*before, training, show)

    def _are_taken(self, references: list[Any], offer: Any, training: Any, show: Callable[[], None]) -> bool:
        """Waits until the queue has all batches of an offer; False where the learner stopped meanwhile."""
        # Room comes when as many are done as are leased at once.
        deadline_s = self._config.learner.step_deadline_s * self._learning.queue.at_once
        give_up_at = time.monotonic() + deadline_s
        while left := references[self._learning.queue.taken(offer, timeout_s=_PUT_SLICE_S) :]:
            if len(left) < len(references):
                references, give_up_at = left, time.monotonic() + deadline_s
            show()
            if ray.wait([training], timeout=0)[0]:
                return False
            if time.monotonic() > give_up_at:
                raise DeadlineError(
                    f"learner: took no batch from the queue within {deadline_s:g} s; raise learner.step_deadline_s"
                    " if a step is really that long, or lower learner.batch_pairs"
                )
            offer = self._learning.queue.offer(references, timeout_s=_PUT_SLICE_S)
        return True

    def _save(self, iteration: int, batches: int, results: list[UpdateResult], *, is_last: bool) -> CheckpointRecord:
        """Has the learner copy its state, to be written while it goes on; it counts once it is acknowledged."""
        name = f"iteration-{iteration:04d}" + ("" if is_last else f"-batch-{batches:06d}")
        self._learning.ask("save", str(self._run_dir / FOLDER / name), what=f"copy {name}")
        return CheckpointRecord(
            path=f"{FOLDER}/{name}", iteration=iteration, batches=batches, step=results[-1].step, digest=""
        )

    def _acknowledge(self, record: CheckpointRecord, results: list[UpdateResult]) -> None:
        """Waits until a checkpoint is on disk, and makes it and its batches count; one on the way to it is removed."""
        digest = self._learning.ask("saved", str(self._run_dir / record.path), what=f"write {record.path}")
        record = replace(record, digest=digest)
        before = [known for known in self._accounts.checkpoints() if known.iteration == record.iteration]
        with self._ledger.transaction():
            self._accounts.acknowledge(record, results)
            for known in before:
                if known.path != record.path:
                    self._accounts.drop_checkpoint(known.path)
        self._learning.steps = record.step
        self._log(record.iteration, results)
        self._learning.tidy()

    def _log(self, iteration: int, results: Sequence[UpdateResult]) -> None:
        """Tells the tracker of steps that it does not know yet."""
        known = self._logged[1] if iteration == self._logged[0] else 0
        for result in (one for one in results if one.batch >= known):
            metrics = {f"step/{name}": value for name, value in result.metrics.items()}
            self._tracker.log(metrics, iteration=iteration, step=result.step)
            known = result.batch + 1
        self._logged = (iteration, known)

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

    def _show(self, done: int, total: int) -> None:
        self._tracker.progress("train", done + self._learning.ask("progress", what="progress"), total, 0)
