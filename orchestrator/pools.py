"""Pools of equal actors: who works on what, who died, and how often that is forgiven.

Work is split among the actors by position, the same way each time; an actor that dies is replaced, brought up to date
by `on_start` (a generator gets the current weights there) and given its share again. Seeds make the second try draw
what the first one would have drawn.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import ray
from ray.exceptions import RayActorError, RayTaskError

from orchestrator.errors import ActorLostError, DeadlineError, PoolError
from orchestrator.remote import fetch, last_words, unwrap

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Work = TypeVar("Work")
Result = TypeVar("Result")

_TICK_S = 0.5


class ActorPool(Generic[Work, Result]):
    """`num_actors` actors made by `make(index)`.

    Args:
        role: what they are, for messages ("generator").
        section: of the configuration, whose `restarts` and `start_deadline_s` hold for them; None: `role`.
        make: starts actor `index` and returns its handle; the actor has a `ready()` method.
        num_actors: size of the pool.
        restarts: deaths forgiven over the pool's life.
        start_deadline_s: seconds until `ready()` and `on_start` must have answered.
        on_start: run on each actor before it gets work, also on replacements; returns a reference to wait for.
    """

    def __init__(
        self,
        *,
        role: str,
        make: Callable[[int], Any],
        num_actors: int,
        restarts: int,
        start_deadline_s: float,
        on_start: Callable[[Any], Any] | None = None,
        section: str | None = None,
    ) -> None:
        self.role = role
        self._section = section or role
        self.on_start = on_start
        self.restarts_left = restarts
        self._make = make
        self._start_deadline_s = start_deadline_s
        self.actors = [make(index) for index in range(num_actors)]

    def wait_ready(self) -> None:
        """Waits until every actor is up.

        Raises:
            DeadlineError: one is not, within the start deadline.
            PoolError: one died on the way; trying again would meet the same cause.
        """
        for index in range(len(self.actors)):
            try:
                self._await_start(index)
            except ActorLostError as error:
                raise PoolError(f"could not start: {error}") from error

    def broadcast(self, call: Callable[[Any], Any], *, what: str, deadline_s: float, knob: str) -> list[Any]:
        """Calls every actor and returns their answers; an actor found dead is replaced first and asked again."""
        refs = [call(actor) for actor in self.actors]
        answers: list[Any] = []
        while len(answers) < len(refs):
            index = len(answers)
            try:
                answers.append(self._fetch(refs[index], index, what, deadline_s, knob))
            except ActorLostError as error:
                self._replace(index, error)
                refs[index] = call(self.actors[index])
        return answers

    def map(
        self,
        call: Callable[[Any, list[Work]], Any],
        work: Sequence[Work],
        *,
        what: str,
        deadline_s: float,
        knob: str,
        on_tick: Callable[[], None] | None = None,
    ) -> list[Result]:
        """Splits `work` by position over the actors, and returns one result for each item, in order.

        Args:
            call: starts a share of the work on an actor; its reference gives as many results, in order.
            work: the items.
            what: what is done, for messages.
            deadline_s: seconds for all of it.
            knob: the configuration key that sets the deadline.
            on_tick: called about twice a second while waiting.

        Raises:
            DeadlineError: naming the actors that still owe results.
            PoolError: the restart budget is used up.
        """
        end = time.monotonic() + deadline_s
        count = len(self.actors)
        results: list[Any] = [None] * len(work)
        pending = {call(self.actors[i], list(work[i::count])): i for i in range(count) if work[i::count]}
        while pending:
            left = end - time.monotonic()
            if left <= 0:
                late = ", ".join(f"{self.role}-{index}" for index in sorted(pending.values()))
                raise DeadlineError(
                    f"{what}: {late} did not answer within {deadline_s:g} s. Raise {knob}, or ask for less."
                )
            ready, _ = ray.wait(list(pending), timeout=min(left, _TICK_S))
            for ref in ready:
                index = pending.pop(ref)
                try:
                    results[index::count] = ray.get(ref)
                except RayActorError as error:
                    self._replace(index, ActorLostError(last_words(error)))
                    pending[call(self.actors[index], list(work[index::count]))] = index
                except RayTaskError as error:
                    raise unwrap(error) from None
            if on_tick is not None:
                on_tick()
        return results

    def _fetch(self, ref: Any, index: int, what: str, deadline_s: float, knob: str) -> Any:
        return fetch(ref, what=f"{self.role}-{index}: {what}", deadline_s=deadline_s, knob=knob)

    def _await_start(self, index: int) -> None:
        actor, deadline_s, knob = self.actors[index], self._start_deadline_s, f"{self._section}.start_deadline_s"
        self._fetch(actor.ready.remote(), index, "start", deadline_s, knob)
        if self.on_start is not None:
            self._fetch(self.on_start(actor), index, "bring up to date", deadline_s, knob)

    def _replace(self, index: int, error: Exception) -> None:
        """Starts a new actor in place of a dead one, for as long as the budget lasts."""
        while True:
            if self.restarts_left == 0:
                raise PoolError(
                    f"{self.role}-{index} died and the restart budget ({self._section}.restarts) is used up. Last"
                    f" words: {error}"
                ) from error
            self.restarts_left -= 1
            self.actors[index] = self._make(index)
            try:
                self._await_start(index)
            except ActorLostError as again:
                error = again
            else:
                return
