"""One wave of work over a pool: who works on what, and what becomes of work whose worker dies.

    share of the work, by key      --> its slot, one share at a time
        worker died                --> the same share again, on the slot's new actor
        its slot is vacant         --> split over the slots that are idle, or the new actor's, whichever is first
    keys that were in work at two deaths --> each alone with a worker
        worker died again          --> that key, in work alone, is to blame: set aside
    much slower than the others    --> idle workers are asked as well; what comes first counts (`speculation.py`)

What is done costs as much as there is of it, whoever else is in the pool: only those slots are looked at whose work has
changed, and answers that come close together are taken together.

A key is set aside only when it was alone with a worker that died by itself, having just shown that it lives. Where a
node was lost or an actor could not be reached, nothing is held against the work. A long file, since all of that turns
on one state.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, ObjectLostError, OutOfMemoryError, RayTaskError

from orchestrator.blame import Blame
from orchestrator.errors import ActorLostError, DeadlineError, FailureKind, PoolError
from orchestrator.events import EventKind
from orchestrator.pace import Pace
from orchestrator.remote import DEATHS, last_words, unwrap
from orchestrator.slots import told
from orchestrator.speculation import Given, Share, Stragglers
from orchestrator.waits import check_wanted, waiting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from orchestrator.blame import Poisoned
    from orchestrator.events import Emit
    from orchestrator.pools import ActorPool
    from orchestrator.slots import Slot
    from orchestrator.speculation import Speculation

Work = TypeVar("Work")
Result = TypeVar("Result")

_TICK_S = 0.5
_LOOKS = 50
"""Answers are waited for until one in so many has come: all that are missing are looked at each time."""
_SIGN_OF_LIFE_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Lost:
    """A worker that died, and what it had."""

    slot: Slot
    actor: Any
    share: Share
    error: ActorLostError
    suspects: frozenset[str]
    """Keys that may have killed it; none where it died of something else."""


class Dispatch(Generic[Work, Result]):
    """One call of `ActorPool.map`; its arguments are explained there."""

    def __init__(
        self,
        pool: ActorPool[Work, Result],
        call: Callable[[Any, list[Work]], Any],
        work: Sequence[Work],
        *,
        what: str,
        deadline_s: float,
        knob: str,
        keys: Sequence[str] | None,
        speculation: Speculation[Work] | None,
        emit: Emit,
    ) -> None:
        self._pool, self._call, self._work, self._keys, self._emit = pool, call, work, keys, emit
        self._what, self._deadline_s, self._knob = what, deadline_s, knob
        self._end = time.monotonic() + deadline_s
        self._results: list[Any] = [None] * len(work)
        self._queues: dict[str, deque[Share]] = {}
        """What waits for a slot, by its name; none of them is empty."""
        self._idle: dict[str, Slot] = {}
        """Slots that have something waiting and have not been looked at since they may have nothing in work."""
        self._busy: set[str] = set()
        self._looks = Pace()
        """At all that is in work."""
        self._pending: dict[Any, Given] = {}
        """By reference of the answer."""
        self._speculation = speculation
        self._stragglers = Stragglers(speculation.share if speculation else 0.0, len(work))
        self._twice: set[Any] = set()
        """References of shares whose items others are asked for as well."""
        self._blame = Blame(keys)

    def run(self, on_tick: Callable[[], None] | None, tick_s: float) -> list[Result | Poisoned]:
        """Works until every item has its result."""
        if not self._work:
            return []
        self._spread(range(len(self._work)), self._workers())
        ticks = Pace(tick_s)
        with waiting(what=self._what, knob=self._knob, deadline_s=self._deadline_s, refs=self._pending):
            while self._dispatch():
                check_wanted()
                left = self._end - time.monotonic()
                if left <= 0:
                    self._give_up()
                if pending := list(self._pending):
                    enough = max(1, len(pending) // _LOOKS)
                    ray.wait(pending, num_returns=enough, timeout=min(left, max(_TICK_S, self._looks.left_s)))
                    self._collect()
                if on_tick is not None and not ticks.left_s:
                    with ticks.work():
                        on_tick()
        return self._results

    def _spread(self, positions: Sequence[int], slots: Sequence[Slot]) -> None:
        """Queues items, split over slots: key by key, or one by one where there are no keys.

        Items of one key go to one worker. What they share is then computed once there, and one that kills its worker
        kills no other.
        """
        for slot, part in zip(slots, self._deal(positions, len(slots)), strict=True):
            if part:
                self._queue(slot, Share(positions=part))

    def _deal(self, positions: Sequence[int], hands: int) -> list[tuple[int, ...]]:
        """Items in so many parts; those of one key stay together, and keys that follow each other mostly.

        Neighbours have more in common (a prompt's judgements, a tree's paths), which is computed once where they meet.
        """
        units: dict[Any, list[int]] = {}
        for position in positions:
            units.setdefault(position if self._keys is None else self._keys[position], []).append(position)
        dealt = list(units.values())
        least, more = divmod(len(dealt), hands)
        edges = [hand * least + min(hand, more) for hand in range(hands + 1)]
        return [tuple(sorted(chain.from_iterable(dealt[start:end]))) for start, end in pairwise(edges)]

    def _queue(self, slot: Slot, share: Share, *, first: bool = False) -> None:
        queue = self._queues.setdefault(slot.name, deque())
        if first:
            queue.appendleft(share)
        else:
            queue.append(share)
        self._idle[slot.name] = slot

    def _dispatch(self) -> bool:
        """Gives each idle slot its next share; False when nothing is left to do."""
        # While somebody is replaced or weights are published, new actors are not yet what they are to be.
        if self._pool.still.acquire(timeout=_TICK_S):
            try:
                self._leave_vacant()
                self._give_out()
                self._give_out_again()
            finally:
                self._pool.still.release()
        return bool(self._pending or self._queues)

    def _give_out(self) -> None:
        idle, self._idle = self._idle, {}
        for name, slot in idle.items():
            while name in self._queues and name not in self._busy and self._works(slot):
                share = self._next_of(name)
                if positions := self._open(share.positions):
                    self._give(slot, Share(positions=positions, alone=share.alone))
            if name in self._queues and slot.actor is None:
                self._idle[name] = slot  # whoever fills it need not be this thread

    def _works(self, slot: Slot) -> bool:
        """Whether somebody works there; one that is to have what others died of must show that it lives.

        A worker that was dead before it was asked would be held against the work.
        """
        share, actor = self._queues[slot.name][0], slot.actor
        if actor is None or not (share.alone or self._blame.is_suspected(share.positions)):
            return actor is not None
        try:
            ray.get(actor.ready.remote(), timeout=_SIGN_OF_LIFE_S)
        except GetTimeoutError:
            return True  # it is waited for like any other
        except DEATHS as error:
            self._replace([(slot, actor, ActorLostError(last_words(error)))])
        return slot.actor is not None

    def _replace(self, died: Sequence[tuple[Slot, Any, ActorLostError]]) -> None:
        for slot, actor, words in died:
            self._pool.report_lost(slot, actor, words, self._what)
        self._pool.revive_all(died, self._end - time.monotonic(), wait=self._speculation is None)

    def _give(self, slot: Slot, share: Share) -> Any:
        ref = self._call(slot.actor, self._items(share))
        self._pending[ref] = Given(slot=slot, actor=slot.actor, share=share, since=time.monotonic())
        self._busy.add(slot.name)
        return ref

    def _items(self, share: Share) -> list[Work]:
        return [self._work[position] for position in share.positions]

    def _give_out_again(self) -> None:
        """Asks idle workers for what is late."""
        if self._speculation is None or not self._pending or self._queues or not (idle := self._idlers()):
            return
        late = self._stragglers.late(self._pending, time.monotonic(), len(idle), self._blame.is_suspected)
        for number, ref in enumerate(late):
            self._copy(ref, idle[number :: len(late)])

    def _in_work_twice(self) -> set[int]:
        """Items whose answer others owe as well."""
        return {position for ref in self._twice for position in self._pending[ref].share.positions}

    def _copy(self, ref: Any, idle: Sequence[Slot]) -> None:
        """Gives what a late worker has to others as well, key by key."""
        given = self._pending[ref]
        asked = [
            (slot, part) for slot, part in zip(idle, self._deal(given.share.positions, len(idle)), strict=True) if part
        ]
        self._twice |= {ref, *(self._give(slot, Share(positions=part, is_copy=True)) for slot, part in asked)}
        others = ", ".join(slot.name for slot, _ in asked)
        text = f"{given.slot} takes more than twice as long as most: {others} has been asked for its work as well"
        self._emit(told(given.slot, EventKind.MOVED, text))

    def _next_of(self, name: str) -> Share:
        queue = self._queues[name]
        share = queue.popleft()
        if not queue:
            del self._queues[name]
        return share

    def _give_up(self) -> None:
        owed = {given.slot.name: str(given.slot) for given in self._pending.values()}
        owed |= {slot.name: f"{slot.name} (vacant)" for slot in self._pool.vacant if slot.name in self._queues}
        late = ", ".join(owed[name] for name in sorted(owed))
        raise DeadlineError(
            f"{self._what}: {late} did not answer within {self._deadline_s:g} s. Raise {self._knob}, or ask for less."
        )

    def _collect(self) -> None:
        """Takes what is done, and puts others in the place of the dead.

        Whoever died meanwhile is looked at before any work is given out again: one key may have killed them all.
        """
        dead: list[_Lost] = []
        while lost := self._take_ready():
            self._blame.charge(death.suspects for death in lost)
            for death in lost:
                if death.share.alone and death.suspects and not self._blame.found_out(death.suspects):
                    self._quarantine(death)
            self._replace([(death.slot, death.actor, death.error) for death in lost])
            dead += lost
        self._requeue(dead)

    def _take_ready(self) -> list[_Lost]:
        """Keeps the results that are there; returns who died instead."""
        if not self._pending:
            return []
        with self._looks.work():
            ready = ray.wait(list(self._pending), num_returns=len(self._pending), timeout=0)[0]
        lost = []
        for ref in ready:
            given = self._take_off(ref)
            try:
                results = ray.get(ref)
            except RayTaskError as error:
                if not isinstance(cause := unwrap(error, self._what), ActorLostError):
                    raise cause from None
                lost.append(self._bury(given, cause, by_itself=True))
            except DEATHS as error:
                words = ActorLostError(last_words(error))
                by_itself = isinstance(error, ActorDiedError | OutOfMemoryError)
                lost.append(self._bury(given, words, by_itself=by_itself))
            except ObjectLostError:
                # The results lay on a node that died after they were made: nothing is wrong with the work.
                asked = self._in_work_twice()
                if rest := tuple(position for position in given.share.positions if position not in asked):
                    self._queue(given.slot, replace(given.share, positions=rest), first=True)
            else:
                self._stragglers.note(time.monotonic() - given.since)
                for position, result in zip(given.share.positions, results, strict=True):
                    if self._results[position] is None:
                        self._results[position] = result
        self._abandon_answered()
        return lost

    def _take_off(self, ref: Any) -> Given:
        given = self._pending.pop(ref)
        self._twice.discard(ref)
        self._busy.discard(given.slot.name)
        if given.slot.name in self._queues:
            self._idle[given.slot.name] = given.slot
        return given

    def _abandon_answered(self) -> None:
        """Nobody waits for shares whose items others have answered."""
        for ref in list(self._twice):
            share = self._pending[ref].share
            if self._speculation and all(self._results[position] is not None for position in share.positions):
                self._speculation.abandon(self._take_off(ref).actor, self._items(share))

    def _bury(self, given: Given, words: ActorLostError, *, by_itself: bool) -> _Lost:
        """Reports a death and keeps what it says of the keys that were in work."""
        slot, actor, share = given.slot, given.actor, given.share
        suspects = frozenset[str]()
        self._pool.report_lost(slot, actor, words, self._what)
        if self._keys is not None and by_itself and _node_lives(slot):
            keys = self._blame.keys_of(share.positions)
            if self._blame.found_out(keys):  # it was in work here as well when it was found out elsewhere
                self._pool.forgive(1)
            else:
                suspects = keys
                self._blame.suspect(keys)
        return _Lost(slot=slot, actor=actor, share=share, error=words, suspects=suspects)

    def _quarantine(self, death: _Lost) -> None:
        """Sets a key aside, and gives back the deaths that it had a part in."""
        (key,) = death.suspects
        poisoned, forgiven = self._blame.set_aside(key, str(death.error))
        self._pool.forgive(forgiven)
        text = (
            f"{key} is set aside: {death.slot} died as it worked on nothing else, after {poisoned.deaths - 1} that"
            f" had it among their work. Last words: {poisoned.last_words}"
        )
        self._emit(told(death.slot, EventKind.QUARANTINED, text, FailureKind.DATA))

    def _requeue(self, lost: Iterable[_Lost]) -> None:
        """Queues the work of the dead again: what is under suspicion key by key, the rest where it was."""
        alone: dict[str, list[int]] = {}
        asked = self._in_work_twice()
        for death in lost:
            rest = []
            for position in self._open(death.share.positions):
                if position in asked:
                    continue
                asked.add(position)
                if self._keys is not None and self._blame.goes_alone(position):
                    alone.setdefault(self._keys[position], []).append(position)
                else:
                    rest.append(position)
            if rest:
                self._queue(death.slot, Share(positions=tuple(rest)), first=True)
        for positions in alone.values():
            self._queue_alone(Share(positions=tuple(sorted(positions)), alone=True))

    def _leave_vacant(self) -> None:
        """Gives the work of vacant slots to idle ones; another thread may have found that nobody works there."""
        waiting = [slot for slot in self._pool.vacant if slot.name in self._queues]
        if not waiting:
            return
        self._pool.fill_vacant(self._end - time.monotonic(), glance_s=0.0 if self._pending else _TICK_S)
        for slot in waiting:
            if slot.actor is not None:
                self._idle[slot.name] = slot
            elif self._free():
                for share in self._queues.pop(slot.name):
                    self._move(share)

    def _move(self, share: Share) -> None:
        """Gives a share of a vacant slot to others."""
        if share.alone:
            self._queue_alone(share)
        else:
            self._spread(share.positions, self._free() or self._workers())

    def _queue_alone(self, share: Share) -> None:
        """Queues a share where it comes soonest."""
        slots = self._free() or sorted(self._workers(), key=lambda slot: len(self._queues.get(slot.name, ())))
        self._queue(slots[0], share)

    def _workers(self) -> list[Slot]:
        """The slots that live, of which there must be one."""
        if not (living := self._pool.living):
            raise PoolError(f"{self._what}: nobody is left in the pool of {self._pool.role}s")
        return living

    def _free(self) -> list[Slot]:
        """Slots that have nothing in work and nothing waiting."""
        return [slot for slot in self._idlers() if slot.name not in self._queues]

    def _idlers(self) -> list[Slot]:
        """Slots whose actors have nothing in work."""
        return [slot for slot in self._pool.living if slot.name not in self._busy]

    def _open(self, positions: Iterable[int]) -> tuple[int, ...]:
        """The items that have no result yet; those that are set aside get their word in place of one."""
        for position in positions:
            if found := self._blame.word_on(position):
                self._results[position] = found
        return tuple(position for position in positions if self._results[position] is None)


def _node_lives(slot: Slot) -> bool:
    return slot.where is not None and any(
        node["NodeID"] == slot.where.node_id and node["Alive"] for node in ray.nodes()
    )
