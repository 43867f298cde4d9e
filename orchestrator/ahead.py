"""Collecting ahead: while the learner is trained on one iteration's pairs, the next ones are sampled and judged.

    learner      | train 1 | publish v1 | evaluate 1 | train 2 | publish v2 | ...
    generators   collect 1 | collect 2 ............. | collect 3 ......
                                ^ v1 takes over between two tokens

`semi_online` is between that and taking turns: no iteration is collected ahead of the one before it, but the learner is
trained on the pairs of a wave while the next wave is collected. Its weights go out when the iteration ends.

Iteration n is collected once the weights of iteration n - 1 - `max_staleness` are published and tried, so that weights
which sample a pair are at most so many updates behind the learner's. With 0 that is while the learner's last checkpoint
is written.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import zip_longest
from threading import Condition, Event, Thread
from typing import TYPE_CHECKING

from conf.judging import asks_policy, needs_main_thread
from conf.pipeline import max_staleness
from orchestrator.context import Stage
from orchestrator.errors import DataError, LostObjectError, PoolError, WeightsLostError
from orchestrator.waits import Unwanted, check_wanted, work_until
from orchestrator.waves import Harvest, Wave

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence
    from contextlib import AbstractContextManager

    from orchestrator.context import Context
    from orchestrator.lineage import Lineage
    from orchestrator.types import PolicyVersion, PreferencePair

_TICK_S = 0.5
_JOIN_S = 8.0
"""How long the end of a run waits for a wave that nobody wants any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Collected:
    """An iteration's pairs, and what it took to make them."""

    harvest: Harvest
    stage: Stage


class Gathering:
    """An iteration's pairs as they come, and what they came to in the end.

    Args:
        cursor: of the stream of prompts, behind those that the iteration took.
        parts: what its waves came to, in order.
        reference: what the pairs are trained against.
    """

    def __init__(self, cursor: int, parts: Iterator[Collected], reference: PolicyVersion) -> None:
        self.cursor = cursor
        self._parts = parts
        self._reference = reference
        self._given: list[list[PreferencePair]] = []
        self.harvest = Harvest()
        """Of what has come."""
        self.stage = Stage(name="collect")
        """Of all of it, once it has come."""
        self.waited_s = 0.0
        """How long the pairs were waited for."""

    def __iter__(self) -> Iterator[list[PreferencePair]]:
        """All pairs, in the same parts each time; waits for them. Raises AgonError: an actor or judge failed."""
        yield from self._given
        while True:
            start = time.monotonic()
            part = next(self._parts, None)
            self.waited_s += time.monotonic() - start
            if part is None:
                return
            self.harvest += part.harvest
            self.stage = part.stage
            self._given.append([replace(pair, reference=self._reference) for pair in part.harvest.pairs])
            yield self._given[-1]

    def metrics(self) -> dict[str, float]:
        """Of rollouts, judge and pairs, and of the time it took, once all have come."""
        waited = {"time/collect_wait_s": self.waited_s, "pairs/evicted": float(self.harvest.evicted)}
        return {**self.harvest.tally, **self.stage.metrics(), **waited}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Plan:
    """What an iteration asks."""

    waves: Sequence[Wave]
    cursor: int
    """Of the stream of prompts, behind those that it takes."""
    outcome: Future[Collected] | None
    """Of its collection ahead; None where it was not begun."""


class Ahead:
    """The pairs of each iteration, in order.

    Args:
        context: of the run.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._bound = max_staleness(context.config)
        self._streams = context.config.pipeline.mode == "semi_online"
        self._draws = not asks_policy(context.config)
        """Whether generators draw the next wave while one is judged."""
        self._waits = self._streams or needs_main_thread(context.config)
        """Whether nothing is collected before it is asked for."""
        self._changed = Condition()
        self._promoted: Lineage
        self._finished = 0
        """The last iteration whose weights are published, tried and kept."""
        self._plans: dict[int, _Plan] = {}
        self._thread: Thread | None = None
        self._error: BaseException | None = None
        self._unwanted = Event()

    def go_on(self, number: int, promoted: Lineage) -> None:
        """Iteration `number` starts from weights that are published and kept: begins to collect what may be now.

        Args:
            number: of the iteration.
            promoted: the policies so far.
        """
        with self._changed:
            self._finished = number - 1
            self._promoted = promoted
            self._changed.notify_all()
        first = max(self._plans, default=number - 1) + 1
        last = self._context.config.pipeline.iterations
        idle = self._waits or self._error or first > last or not self._context.publisher.is_published
        if idle or self._lives:
            return
        self._thread = Thread(target=self._run, args=(first,), name="collect ahead", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises AgonError: what collecting ahead came to."""
        if self._error is not None:
            raise self._error

    def take(self, number: int) -> Gathering:
        """The pairs of the iteration that was gone on to last. Raises AgonError: an actor or judge failed."""
        current, reference = self._promoted.latest[-1], self._promoted.reference
        plan = self._await_plan(number) or self._plan(number)
        waves = self._placed(plan.waves)
        if self._streams:
            self._restore(number, waves, current)
            return Gathering(plan.cursor, self._stream(waves), reference)
        start, found = time.monotonic(), self._early(number, plan)
        if found is None or not all(wave.takes(found.harvest.sampled_by) for wave in waves):
            self._restore(number, waves, current)
            found = self._collect(waves)
        gathering = Gathering(plan.cursor, iter([found]), reference)
        gathering.waited_s = time.monotonic() - start
        return gathering

    def close(self) -> None:
        """Nobody wants what is collected any more."""
        self._unwanted.set()
        if self._thread is not None:
            self._thread.join(_JOIN_S)

    @property
    def _lives(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _await_plan(self, number: int) -> _Plan | None:
        """That of an iteration which is collected ahead; None where nobody does."""
        with self._changed:
            while number not in self._plans and self._lives:
                self._changed.wait(_TICK_S)
            return self._plans.pop(number, None)

    def _early(self, number: int, plan: _Plan) -> Collected | None:
        """What was collected ahead; None where nothing was, or could not be."""
        if plan.outcome is None:
            return None
        self._context.tracker.stage(number, "collect")
        try:
            return _result(plan.outcome)
        except WeightsLostError:
            return None

    def _restore(self, number: int, waves: Sequence[Wave], current: PolicyVersion) -> None:
        """Where the learner has gone on from pairs that are to be made again, it and the generators go back."""
        context = self._context
        if not context.waves.are_committed(waves) and context.learning.undo(number):
            context.publish(current.number, number)

    def _plan(self, number: int, outcome: Future[Collected] | None = None) -> _Plan:
        context, config = self._context, self._context.config.pipeline
        # Prompts that were set aside later are not left out: a run that is resumed has to take the same ones.
        context.prompts.skip = frozenset(context.accounts.quarantined(before=number - self._bound))
        prompts = context.prompts.take(config.prompts_per_iteration)
        waves = [
            Wave(
                iteration=number,
                number=index,
                prompts=prompts[start : start + config.wave_prompts],
                policies=None,
                reference=None,
            )
            for index, start in enumerate(range(0, len(prompts), config.wave_prompts))
        ]
        return _Plan(waves=waves, cursor=context.prompts.cursor, outcome=outcome)

    def _placed(self, waves: Sequence[Wave]) -> list[Wave]:
        """Waves of the iteration that was gone on to last, with what may sample them and their reference."""
        promoted = self._promoted  # which another thread may set anew
        current = promoted.latest[-1].number
        policies = [one for one in dict.fromkeys(promoted.latest) if one.number >= current - self._bound]
        return [replace(wave, policies=policies, reference=promoted.reference) for wave in waves]

    def _collect(self, waves: Sequence[Wave], *, quietly: bool = False) -> Collected:
        harvest = Harvest()
        with self._collecting(waves, quietly=quietly) as stage, closing(self._harvests(waves)) as harvests:
            for part in harvests:
                harvest += part
                stage.tokens += part.tokens
        return Collected(harvest=harvest, stage=stage)

    def _collecting(self, waves: Sequence[Wave], *, quietly: bool) -> AbstractContextManager[Stage]:
        """The stage; the one that an earlier process noted where all that it made is read back."""
        context, number = self._context, waves[0].iteration
        done = context.ledger.finished_phase(number, "collect")
        if done is None or done.seconds is None or not context.waves.are_committed(waves):
            return context.stage("collect", number, quietly=quietly)
        if not quietly:
            context.tracker.stage(number, "collect")
        return nullcontext(Stage(name="collect", seconds=done.seconds, tokens=done.tokens))

    def _harvests(self, waves: Sequence[Wave]) -> Generator[Harvest]:
        """Of each wave in turn; where judging needs no generators, they draw the next wave meanwhile."""
        if not self._draws or len(waves) == 1:
            yield from map(self._collect_one, waves)
            return
        over = Event()
        with ThreadPoolExecutor(1, "draw", initializer=work_until, initargs=(over, self._unwanted)) as drawer:
            try:
                drawing = drawer.submit(self._context.waves.draw, waves[0])
                for wave, following in zip_longest(waves, waves[1:]):
                    tokens = _wanted(drawing)
                    if following is not None:
                        drawing = drawer.submit(self._context.waves.draw, following)
                    found = self._collect_one(wave)
                    yield replace(found, tokens=found.tokens + tokens)
            finally:
                over.set()

    def _collect_one(self, wave: Wave) -> Harvest:
        context = self._context
        with context.bench.taken() if self._draws else context.alone():
            return context.waves.collect(wave)

    def _stream(self, waves: Sequence[Wave]) -> Iterator[Collected]:
        """Wave by wave: the next ones are collected while whoever iterates does something else."""
        outcomes: list[Future[Collected]] = [Future() for _ in waves]
        self._thread = Thread(target=self._run_stream, args=(waves, outcomes), name="collect", daemon=True)
        self._thread.start()
        for outcome in outcomes:
            yield _result(outcome)

    def _run_stream(self, waves: Sequence[Wave], outcomes: Sequence[Future[Collected]]) -> None:
        work_until(self._unwanted)
        try:
            with (
                self._collecting(waves, quietly=True) as stage,
                closing(self._harvests(waves)) as harvests,
            ):
                for harvest, outcome in zip(harvests, outcomes, strict=True):
                    stage.tokens += harvest.tokens
                    if outcome is not outcomes[-1]:
                        outcome.set_result(Collected(harvest=harvest, stage=stage))
            outcomes[-1].set_result(Collected(harvest=harvest, stage=stage))  # behind the stage, which has an end now
        except BaseException as error:  # noqa: BLE001 - raised where the pairs are asked for
            if isinstance(error, LostObjectError):  # nobody is to take it for a death of the learner
                error = PoolError(
                    f"the generators cannot go on: {error}. Resume the run, which does the iteration again."
                )
            next(outcome for outcome in outcomes if not outcome.done()).set_exception(error)

    def _run(self, first: int) -> None:
        """Collects one iteration after the other, as far ahead as it may."""
        work_until(self._unwanted)
        with suppress(Unwanted, DataError):  # too few prompts: said again where they are asked for
            for number in range(first, self._context.config.pipeline.iterations + 1):
                self._await_finished(number - 1 - self._bound)
                outcome: Future[Collected] = Future()
                plan = self._plan(number, outcome)
                with self._changed:
                    self._plans[number] = plan
                    self._changed.notify_all()
                try:
                    waves = plan.waves if self._bound else self._placed(plan.waves)
                    outcome.set_result(self._collect(waves, quietly=True))
                except BaseException as error:  # noqa: BLE001 - raised where the pairs are asked for
                    if not isinstance(error, WeightsLostError):
                        self._error = error
                    outcome.set_exception(error)
                    return

    def _await_finished(self, number: int) -> None:
        with self._changed:
            while self._finished < number:
                self._changed.wait(_TICK_S)
                check_wanted()


def _wanted(drawing: Future[int]) -> int:
    while not drawing.done():
        wait([drawing], timeout=_TICK_S)
        check_wanted()
    return drawing.result()


def _result(outcome: Future[Collected]) -> Collected:
    while not outcome.done():
        wait([outcome], timeout=_TICK_S)
    return outcome.result()
