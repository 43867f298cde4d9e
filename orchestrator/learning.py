"""The learner as the loop sees it: it holds what the ledger says, whoever dies, and what is on its way into the ledger.

When the learner dies, another starts from the last checkpoint that counts, and what it was asked is asked again:
batches that were trained on since are trained on again, and in the weights that are kept each is once
(`orchestrator/training.py`). One that dies after an iteration's training, and before its last checkpoint is on disk,
takes published weights with it: whoever asks for it is told so until the iteration was trained again (`fell_back`). A
queue that dies takes nothing with it: it is filled again.
"""

from __future__ import annotations

import shutil
import time
from threading import RLock
from typing import TYPE_CHECKING, Any, TypeVar

import ray

from learners.manifest import manifest_digest
from orchestrator.errors import (
    ActorLostError,
    ActorStartError,
    DeadlineError,
    FailureKind,
    LostObjectError,
    ModelError,
    PoolError,
    UnsettledError,
)
from orchestrator.events import Event, EventKind
from orchestrator.remote import fetch
from orchestrator.waits import Peer, forget, introduce

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conf.schema import Config
    from orchestrator.accounts import Accounts, CheckpointRecord
    from orchestrator.events import Emit
    from orchestrator.ledger import Ledger
    from orchestrator.queues import BatchQueue

Result = TypeVar("Result")

FOLDER = "checkpoints"
_ALIVE_S = 10.0  # a learner that does not even say so within this time is replaced


class Learning:
    """The one learner of a run, and whoever takes its place.

    Args:
        config: of the run.
        run_dir: its folder.
        start: starts a learner's actor.
        start_queue: starts a queue's.
        ledger: whose transactions change what counts.
        accounts: of the ledger.
        emit: told of deaths and of damaged checkpoints.
    """

    def __init__(
        self,
        *,
        config: Config,
        run_dir: Path,
        start: Callable[[], Any],
        start_queue: Callable[[], BatchQueue],
        ledger: Ledger,
        accounts: Accounts,
        emit: Emit,
    ) -> None:
        self._config = config
        self._run_dir = run_dir
        self._start = start
        self._start_queue = start_queue
        self._ledger = ledger
        self._accounts = accounts
        self._emit = emit
        self._restarts_left = config.learner.restarts
        self.version = 0
        """Number of the policy version last published; staleness is counted from it."""
        self.steps = 0
        """Batches of the run that the weights which count contain."""
        self.alone = RLock()
        """Held by a thread while it has the learner to itself."""
        self.has_moved = False
        """Whether it has been trained since its weights were published last."""
        self.is_ahead = False
        """Whether what it was trained on is not on disk yet, although whoever trained it is done."""
        self.fell_back = False
        """Whether one that was ahead died, and nobody was trained again in its place yet."""
        self._is_restored = True
        """False of a learner that was started anew and does not hold the last checkpoint that counts yet."""
        self.tidy(partial=True)  # nobody writes yet
        self.actor = self._begin()
        self.queue = self._start_queue()

    def wait_ready(self) -> None:
        """Waits until the learner and its queue are up; where a process is killed on the way, others take their place.

        Raises:
            DeadlineError: one of them is not up, within `learner.start_deadline_s`.
            ActorStartError: the learner raised an error, so that another would meet the same cause.
            PoolError: the restart budget is used up.
        """
        try:
            self._await_start()
        except ActorStartError:
            raise
        except ActorLostError as error:
            self._replace(error)

    def _await_start(self) -> None:
        where = fetch(
            self.actor.where.remote(),
            what="learner: start",
            deadline_s=self._config.learner.start_deadline_s,
            knob="learner.start_deadline_s",
        )
        introduce(Peer(role="learner", name="learner", actor=self.actor, where=where))
        self.queue.wait_ready(self._config.learner.start_deadline_s)

    def _begin(self) -> Any:
        actor = self._start()
        introduce(Peer(role="learner", name="learner", actor=actor, where=None))
        return actor

    def _begin_anew(self) -> None:
        forget(self.actor)
        ray.kill(self.actor)
        self._is_restored = False
        self.actor = self._begin()
        self._await_start()

    def now_at(self, version: int) -> None:
        """Its weights are published, as `version`."""
        self.version, self.has_moved = version, False

    def move(self) -> None:
        """It is about to be trained: from now on its weights are not the published ones."""
        with self.alone:
            self.has_moved = True

    def call(self, method: str, *arguments: Any, what: str) -> Any:
        """Calls the learner; one that dies meanwhile is replaced, and whoever took its place is asked.

        Raises:
            DeadlineError: no answer within `learner.step_deadline_s`.
            PoolError: the restart budget is used up.
        """
        return self.surviving(lambda: self.ask(method, *arguments, what=what))

    def surviving(self, action: Callable[[], Result], *, anew: bool = False) -> Result:
        """Runs `action`, which needs the learner, again after each death of it, for as long as the budget lasts.

        No other thread has the learner meanwhile.

        Args:
            action: what is done.
            anew: whether it begins with what counts: it trains again what was lost, or gives it up.

        Raises:
            PoolError: the restart budget is used up.
            UnsettledError: the learner that is meant died before what it was trained on counted.
        """
        with self.alone:
            self.fell_back = self.fell_back and not anew
            while True:
                if self.fell_back:
                    raise UnsettledError("the learner died before what it was trained on was on disk")
                try:
                    return action()
                except UnsettledError:
                    raise
                except (ActorLostError, LostObjectError) as error:
                    self._replace(error)

    def restore(self) -> CheckpointRecord | None:
        """Brings the learner to the newest checkpoint that is whole; None: to the initial model.

        A damaged one is reported, and what only it contained is trained on again. A disk that fails or does not answer
        says nothing of what is on it.

        Raises:
            ActorLostError: the learner died.
            DeadlineError: a checkpoint was not loaded in time.
            OSError: the disk fails.
        """
        damaged = False
        for record in reversed(self._accounts.checkpoints()):
            try:
                self._load(record)
            except (ModelError, FileNotFoundError) as error:
                self._give_up_checkpoint(record, error)
                damaged = True
            else:
                return record
        if damaged:
            self._begin_anew()
        self.steps = 0
        return None

    def _load(self, record: CheckpointRecord) -> None:
        folder = self._run_dir / record.path
        if manifest_digest(folder) != record.digest:
            raise ModelError(f"{folder} is another checkpoint than the one that was written there.")
        self.steps = self.ask("load", str(folder), self.version, what=f"load {record.path}")

    def _give_up_checkpoint(self, record: CheckpointRecord, error: ModelError | FileNotFoundError) -> None:
        known = self._accounts.checkpoints()
        before = known[known.index(record) - 1] if known.index(record) else None
        self._emit(
            Event(
                kind=EventKind.DAMAGED,
                iteration=record.iteration,
                failure=FailureKind.INFRASTRUCTURE,
                text=f"{str(error).rstrip('.')}. Going on from {before.path if before else 'the initial model'}:"
                " what was trained on since is trained on again.",
            )
        )
        with self._ledger.transaction():
            self._accounts.rewind(before)
            self._ledger.unfinish_iterations(after=before.iteration if before else 0)

    def tidy(self, *, partial: bool = False) -> None:
        """Removes folders of checkpoints that do not count; `partial`: also what nobody writes to any more."""
        kept = {self._run_dir / record.path for record in self._accounts.checkpoints()}
        folder = self._run_dir / FOLDER
        for path in list(folder.iterdir()) if folder.exists() else ():
            if path not in kept and (partial or not path.name.startswith(".")):
                shutil.rmtree(path, ignore_errors=True)  # what is left of it is removed the next time

    def undo(self, iteration: int) -> bool:
        """Takes back what counts of an iteration's training, whose pairs are damaged; False where nothing does."""
        known = self._accounts.checkpoints()
        before = [record for record in known if record.iteration < iteration]
        if before == known:
            return False
        with self._ledger.transaction():
            self._accounts.rewind(before[-1] if before else None)
            self._ledger.unfinish_iterations(after=iteration - 1)
        self.surviving(self._go_back)
        return True

    def give_up(self, iteration: int) -> None:
        """Rolls the training of an iteration back: the learner is as it was before, and so is what counts."""
        with self._ledger.transaction():
            self._accounts.give_up(iteration)
        self._renew_queue()
        self.is_ahead = False
        self.surviving(self._go_back, anew=True)
        self.tidy(partial=True)  # who goes back has ended what it wrote

    def _replace(self, error: ActorLostError | LostObjectError) -> None:
        """Has a learner and a queue in place of what died; a new learner has the last checkpoint that counts."""
        started = time.monotonic()
        while True:
            if self._restarts_left == 0:
                raise PoolError(
                    f"the learner or its queue died and the restart budget (learner.restarts) is used up. Last words:"
                    f" {error}"
                ) from error
            self._restarts_left -= 1
            self._tell(EventKind.LOST, f"{error} ({self._restarts_left} restarts of the learner left)")
            lives = self._is_restored and self._lives()
            if not lives and self.is_ahead:
                self.is_ahead, self.fell_back, self.has_moved = False, True, True
            try:
                self._renew_queue()
                if lives:
                    came_from = "where it was, with a new queue"
                else:
                    self._begin_anew()
                    came_from = self._go_back(fresh=True)
                break
            except ActorLostError as again:
                error = again
        seconds = time.monotonic() - started
        self._tell(EventKind.REPLACED, f"learner: goes on from {came_from} after {seconds:.1f} s")

    def _go_back(self, *, fresh: bool = False) -> str:
        """To the last checkpoint that counts; returns its name. A `fresh` learner holds the initial model.

        Raises:
            PoolError: it is damaged: more than this process knows of has to be done again.
        """
        known = self._accounts.checkpoints()
        if not known:
            if not fresh:
                self._begin_anew()
            self.steps, self._is_restored = 0, True
            return "the initial model"
        if self.restore() != known[-1]:
            raise PoolError(
                f"{known[-1].path} is damaged, and with it iterations that were finished: stop here, and resume the"
                " run, which does them again from their pairs"
            )
        self._is_restored = True
        return known[-1].path

    def _lives(self) -> bool:
        try:
            fetch(self.actor.ready.remote(), what="learner: sign of life", deadline_s=_ALIVE_S, knob="learner.restarts")
        except (ActorLostError, DeadlineError):
            return False
        return True

    def _renew_queue(self) -> None:
        """A queue that knows nothing of batches that were handed out before."""
        self.queue.end()
        self.queue = self._start_queue()
        self.queue.wait_ready(self._config.learner.start_deadline_s)

    def _tell(self, kind: EventKind, text: str) -> None:
        self._emit(Event(kind=kind, role="learner", actor="learner", failure=FailureKind.INFRASTRUCTURE, text=text))

    def ask(self, method: str, *arguments: Any, what: str) -> Any:
        """Calls the learner that is there now. Raises ActorLostError: it died; DeadlineError: it takes too long."""
        return fetch(
            getattr(self.actor, method).remote(*arguments),
            what=f"learner: {what}",
            deadline_s=self._config.learner.step_deadline_s,
            knob="learner.step_deadline_s",
        )
