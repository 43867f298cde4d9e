"""Pools of equal actors: who lives, who died, and how often that is forgiven.

    dead actor --> replaced in place, brought up to date, given its share again   the same share: the same results
                   not within its deadline, or where time decides who answers --> its slot is vacant meanwhile
    vacant slot --> its work moves to whoever is idle; taken back when its new actor is up

Work is split among the actors, the same way each time (`orchestrator/dispatch.py`). An actor that is
started is brought up to date by `on_start` (a generator gets the current weights there). Seeds make a second try draw
what the first one would have drawn.

One thread may `map` while another calls `broadcast`: whoever sees a death first mends it, once, and the other one goes
on with what took its place.
"""

from __future__ import annotations

import time
from threading import RLock
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import ray

from orchestrator.dispatch import Dispatch
from orchestrator.errors import (
    ActorLostError,
    ActorStartError,
    DeadlineError,
    PoolError,
    UnsettledError,
    WeightsLostError,
)
from orchestrator.events import EventKind, ignore
from orchestrator.remote import fetch
from orchestrator.slots import Slot, told
from orchestrator.waits import Peer, forget, introduce

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from orchestrator.blame import Poisoned
    from orchestrator.events import Emit
    from orchestrator.speculation import Speculation

Work = TypeVar("Work")
Result = TypeVar("Result")

_GLANCE_S = 0.2
"""How long a wave waits for the new actor of a slot that was vacant before it."""


class ActorPool(Generic[Work, Result]):
    """`num_actors` actors made by `make(index)`.

    Args:
        role: what they are, for messages ("generator").
        section: of the configuration, whose `restarts` and `start_deadline_s` hold for them; None: `role`.
        make: starts actor `index` and returns its handle; the actor is an `orchestrator.stacks.Observable` with a
            `ready()` method.
        num_actors: size of the pool.
        restarts: deaths forgiven over the pool's life; those that a piece of work is to blame for are given back.
        start_deadline_s: seconds until `ready()` must have answered.
        on_start: run on each actor before it gets work, also on replacements; returns when it is done.
        emit: told of actors that are lost, replaced or given up, and of work that is set aside.
    """

    def __init__(
        self,
        *,
        role: str,
        make: Callable[[int], Any],
        num_actors: int,
        restarts: int,
        start_deadline_s: float,
        on_start: Callable[[Any], None] | None = None,
        section: str | None = None,
        emit: Emit = ignore,
    ) -> None:
        self.role = role
        self._section = section or role
        self.on_start = on_start
        self.restarts_left = restarts
        self._make = make
        self._start_deadline_s = start_deadline_s
        self._emit = emit
        self.still = RLock()
        """Held by a thread while nobody may be replaced by another one."""
        self._vacant: dict[int, Slot] = {}
        self.slots = [Slot(role=role, index=index) for index in range(num_actors)]
        for slot in self.slots:
            self._fill(slot)

    @property
    def living(self) -> list[Slot]:
        """The slots that are not vacant."""
        return [slot for slot in self.slots if slot.actor is not None]

    @property
    def vacant(self) -> list[Slot]:
        """The slots in which nobody works now."""
        return list(self._vacant.values())

    @property
    def actors(self) -> list[Any]:
        """Handles of the actors that are not known to be dead."""
        return [slot.actor for slot in self.living]

    @property
    def nodes(self) -> list[str]:
        """Ids of the nodes that they are on, each once."""
        return sorted({slot.where.node_id for slot in self.living if slot.where is not None})

    def wait_ready(self) -> None:
        """Waits until every actor is up; one whose process is killed on the way is replaced.

        Raises:
            DeadlineError: one is not, within the start deadline.
            PoolError: one raised an error, so that another would meet the same cause; or the restart budget is used up.
        """
        for slot in self.slots:
            try:
                self._await_start(slot, self._start_deadline_s)
            except ActorStartError as error:
                raise PoolError(f"could not start: {error}") from error
            except ActorLostError as error:
                actor = slot.actor
                self.report_lost(slot, actor, error, "start")
                self.revive(slot, actor, error, self._start_deadline_s)

    def broadcast(self, call: Callable[[Any], Any], *, what: str, deadline_s: float, knob: str) -> list[Any]:
        """Calls every actor and returns their answers; an actor found dead is replaced first and asked again.

        A slot that is vacant, or stays so, is left out.

        Raises:
            DeadlineError: one did not answer.
            PoolError: the restart budget is used up, or nobody is left.
        """
        end = time.monotonic() + deadline_s
        with self.still:
            self.fill_vacant(deadline_s)
            if not self.living:
                raise PoolError(f"{what}: nobody is left in the pool of {self.role}s")
            refs = {slot.name: call(slot.actor) for slot in self.living}
            answers = []
            for slot in self.living:
                while (actor := slot.actor) is not None:
                    try:
                        left_s = max(_GLANCE_S, end - time.monotonic())
                        answers.append(
                            fetch(refs[slot.name], what=f"{slot.name}: {what}", deadline_s=left_s, knob=knob)
                        )
                        break
                    except ActorLostError as error:
                        self.report_lost(slot, actor, error, what)
                        if self.revive(slot, actor, error, end - time.monotonic()):
                            refs[slot.name] = call(slot.actor)
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
        tick_s: float = 0.5,
        keys: Sequence[str] | None = None,
        speculation: Speculation[Work] | None = None,
    ) -> list[Result | Poisoned]:
        """Splits `work` over the actors, and returns one result for each item, in order.

        Args:
            call: starts a share of the work on an actor; its reference gives as many results, in order.
            work: the items.
            what: what is done, for messages.
            deadline_s: seconds for all of it.
            knob: the configuration key that sets the deadline.
            on_tick: called about every `tick_s` seconds while waiting, less often where it takes long.
            tick_s: seconds.
            keys: of the items, those of one key go to one actor, and live or die together: where a key's items kill
                their worker again and again, each of them gives `Poisoned` in place of a result. None: nothing is ever
                set aside.
            speculation: whether idle actors are asked as well where one takes much longer than the others.

        Raises:
            DeadlineError: naming the actors that still owe results.
            PoolError: the restart budget is used up, or nobody is left.
            LostObjectError: something that the work refers to is gone.
        """
        self.fill_vacant(deadline_s)
        dispatch: Dispatch[Work, Result] = Dispatch(
            self,
            call,
            work,
            what=what,
            deadline_s=deadline_s,
            knob=knob,
            keys=keys,
            speculation=speculation,
            emit=self._emit,
        )
        return dispatch.run(on_tick, tick_s)

    def report_lost(self, slot: Slot, actor: Any, error: Exception, doing: str) -> None:
        """Says once that an actor is dead, and sees to it that it is: one that only cannot be reached is killed."""
        with self.still:
            if actor is slot.lost or (actor is not slot.actor and actor is not slot.candidate):
                return
            slot.lost = actor
            ray.kill(actor)
            forget(actor)
            self._emit(told(slot, EventKind.LOST, f"{slot} died: {doing}. Last words: {error}"))

    def vacate(self, actors: Sequence[Any], why: Exception) -> None:
        """Has actors that live do nothing until `on_start` has brought them up to date again."""
        with self.still:
            for slot in self.living:
                if any(slot.actor is actor for actor in actors):
                    self._vacate(slot, why)

    def forgive(self, deaths: int) -> None:
        """Gives deaths back to the restart budget: those that a piece of work is to blame for."""
        with self.still:
            self.restarts_left += deaths

    def revive(self, slot: Slot, dead: Any, error: Exception, left_s: float) -> bool:
        """Starts a new actor in place of a dead one, for as long as the restart budget lasts.

        Args:
            slot: whose actor was reported lost.
            dead: that actor; where another thread has put one in its place already, nothing is left to do.
            error: what it died of.
            left_s: seconds that whoever needs it can wait, beside the start deadline.

        Returns:
            Whether the slot works again; otherwise it is vacant.

        Raises:
            PoolError: the restart budget is used up, or no other slot is left.
            WeightsLostError: no other slot is left, and there is nothing to bring the new actor up to date with.
        """
        self.revive_all([(slot, dead, error)], left_s)
        return slot.actor is not None

    def revive_all(self, lost: Iterable[tuple[Slot, Any, Exception]], left_s: float, *, wait: bool = True) -> None:
        """Like `revive`, of several that died: their successors start at the same time.

        Not to `wait` leaves their slots vacant until then, unless nobody else works: then whoever is up first is waited
        for.
        """
        with self.still:
            started = [(slot, error) for slot, dead, error in lost if slot.actor is dead]
            for slot, error in started:
                self._refill(slot, error)
            for slot, error in started:
                if wait:
                    self._see_up(slot, left_s)
                else:
                    self._vacate(slot, error)
            for _, error in started:
                self._need_somebody(error, min(self._start_deadline_s, left_s))

    def _refill(self, slot: Slot, error: Exception) -> None:
        if self.restarts_left == 0:
            raise PoolError(
                f"{slot.name} died and the restart budget ({self._section}.restarts) is used up. Last words: {error}"
            ) from error
        self.restarts_left -= 1
        self._fill(slot)

    def _see_up(self, slot: Slot, left_s: float) -> None:
        """Waits until a new actor works, or its slot is vacant; one that dies on the way is started again."""
        start, limit_s = time.monotonic(), max(_GLANCE_S, min(self._start_deadline_s, left_s))
        while True:
            try:
                self._await_start(slot, limit_s)
            except ActorLostError as again:
                self.report_lost(slot, slot.actor, again, "start")
                self._refill(slot, again)
            except (DeadlineError, WeightsLostError) as late:
                self._vacate(slot, late)
                self._need_somebody(late, 0.0)
                return
            else:
                self._tell_replaced(slot, start)
                return

    def _need_somebody(self, why: Exception, left_s: float) -> None:
        """Where every slot is vacant, waits for whoever is up first."""
        end = time.monotonic() + left_s
        while not self.living:
            left_s = end - time.monotonic()
            self.fill_vacant(max(_GLANCE_S, left_s), glance_s=max(0.0, left_s), enough=1)
            if not self.living and end <= time.monotonic():
                if isinstance(why, WeightsLostError):
                    raise why
                raise PoolError(f"{self.role}s could not be replaced, and nobody is left: {why}") from why

    def fill_vacant(self, left_s: float, *, glance_s: float = _GLANCE_S, enough: int | None = None) -> None:
        """Takes back the vacant slots whose new actor is up by now; one that died on the way is started again.

        Args:
            left_s: seconds that whoever needs them can wait for their weights.
            glance_s: seconds to wait for those that are almost up.
            enough: so many of them; None: all.

        Raises:
            PoolError: the restart budget is used up.
            WeightsLostError: nobody works, and there is nothing to bring one up to date with.
        """
        with self.still:
            asked = {slot.is_up: slot for slot in self._vacant.values()}
            num = min(len(asked), enough or len(asked))
            answered = ray.wait(list(asked), num_returns=num, timeout=glance_s)[0] if asked else []
            for ref in answered:
                if asked[ref].is_up is ref and asked[ref].index in self._vacant:  # bringing one up to date may have
                    self._take_back(asked[ref], left_s)

    def _take_back(self, slot: Slot, left_s: float) -> None:
        slot.actor = slot.candidate
        del self._vacant[slot.index]
        try:
            self._await_start(slot, min(self._start_deadline_s, left_s))
        except ActorLostError as error:
            self.report_lost(slot, slot.actor, error, "start")
            self._refill(slot, error)
            self._vacate(slot, error)
        except (DeadlineError, WeightsLostError) as late:
            self._vacate(slot, late)
            if isinstance(late, WeightsLostError) and not self.living:
                raise
        else:
            self._tell_replaced(slot, slot.vacated_at)

    def _fill(self, slot: Slot) -> None:
        slot.actor, slot.where = self._make(slot.index), None
        introduce(Peer(role=self.role, name=slot.name, actor=slot.actor, where=None))

    def _await_start(self, slot: Slot, limit_s: float) -> None:
        actor, knob = slot.actor, f"{self._section}.start_deadline_s"
        _, slot.where = fetch(
            [actor.ready.remote(), actor.where.remote()], what=f"{slot.name}: start", deadline_s=limit_s, knob=knob
        )
        introduce(Peer(role=self.role, name=slot.name, actor=actor, where=slot.where))
        if self.on_start is not None:
            self.on_start(actor)

    def _vacate(self, slot: Slot, why: Exception) -> None:
        is_told = slot.candidate is slot.actor
        slot.candidate, slot.actor = slot.actor, None
        slot.is_up = slot.candidate.ready.remote()
        self._vacant[slot.index] = slot
        if not is_told:
            slot.vacated_at = time.monotonic()
            hint = "" if isinstance(why, (ActorLostError, UnsettledError)) else f". Is a machine gone? {why}"
            text = f"work of {slot.name} goes to whoever is idle until its new actor is up{hint}"
            self._emit(told(slot, EventKind.MOVED, text))

    def _tell_replaced(self, slot: Slot, start: float) -> None:
        took, knob = time.monotonic() - start, f"{self._section}.restarts"
        text = f"{slot} took its place after {took:.1f} s; {knob} has {self.restarts_left} left"
        self._emit(told(slot, EventKind.REPLACED, text))
