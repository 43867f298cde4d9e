"""The bounded queue between producers of preference batches and the learner.

    producer --put--> [ queued ] --lease--> [ leased ] --acknowledge--> gone
                          ^------redeliver------'   (the lease ran out, or its holder gave it back)

The queue holds object references, not batches: the bytes stay in the object store and are read there zero-copy.
Queued and leased batches together never exceed the capacity: that is the back-pressure, and it bounds how far
producers can run ahead of the learner.

`LeaseBuffer` is the state machine, free of time and threads; `QueueActor` adds waiting; `BatchQueue` is the handle.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict, deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import ray

from orchestrator.errors import QueueClosedError
from orchestrator.remote import actor_class, fetch
from orchestrator.stacks import Observable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease(Generic[Item]):
    """The right to work on one item until `expires_at`."""

    id: int
    item: Item
    attempt: int
    """1 for the first delivery."""
    expires_at: float
    """Seconds on the queue's own clock."""


def at_once(capacity: int) -> int:
    """Half of a queue: while its batches are worked on, the other half is filled."""
    return max(1, capacity // 2)


class LeaseBuffer(Generic[Item]):
    """First in, first out; each item is delivered until it is acknowledged.

    A redelivered item goes to the front, in its old order. All times come from the caller.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, found {capacity}")
        self.capacity = capacity
        self.closed = False
        self._next_id = 0
        self._queued: deque[tuple[int, Item, int]] = deque()
        self._leased: OrderedDict[int, Lease[Item]] = OrderedDict()

    def __len__(self) -> int:
        """Items not yet acknowledged."""
        return len(self._queued) + len(self._leased)

    def put(self, item: Item) -> bool:
        """Appends an item; False when the buffer is full. Raises QueueClosedError on a closed one."""
        if self.closed:
            raise QueueClosedError("put on a closed queue")
        if len(self) >= self.capacity:
            return False
        self._queued.append((self._next_id, item, 0))
        self._next_id += 1
        return True

    def lease(self, *, now: float, duration: float) -> Lease[Item] | None:
        """Delivers the oldest queued item; None when nothing is queued.

        Raises:
            QueueClosedError: closed, and nothing is queued or leased any more.
        """
        self.redeliver_expired(now)
        if not self._queued:
            if self.closed and not self._leased:
                raise QueueClosedError("the queue is closed and empty")
            return None
        item_id, item, attempts = self._queued.popleft()
        lease = Lease(id=item_id, item=item, attempt=attempts + 1, expires_at=now + duration)
        self._leased[item_id] = lease
        return lease

    def acknowledge(self, lease_id: int) -> bool:
        """Forgets a leased item; False when the lease had run out or is unknown (the work must then be discarded)."""
        return self._leased.pop(lease_id, None) is not None

    def redeliver(self, lease_id: int) -> bool:
        """Puts a leased item back to the front at once; False when the lease is unknown."""
        lease = self._leased.pop(lease_id, None)
        if lease is None:
            return False
        self._put_back([lease])
        return True

    def redeliver_expired(self, now: float) -> int:
        """Puts back every item whose lease has run out; returns how many."""
        expired = [lease for lease in self._leased.values() if lease.expires_at <= now]
        for lease in expired:
            del self._leased[lease.id]
        self._put_back(expired)
        return len(expired)

    def close(self) -> None:
        """Accepts nothing more; what is queued is still delivered."""
        self.closed = True

    def _put_back(self, leases: list[Lease[Item]]) -> None:
        merged = [(lease.id, lease.item, lease.attempt) for lease in leases] + list(self._queued)
        self._queued = deque(sorted(merged, key=lambda entry: entry[0]))


class QueueActor(Observable):
    """`LeaseBuffer` behind asyncio: callers wait here for room or for work, with a deadline."""

    def __init__(self, capacity: int) -> None:
        self._buffer: LeaseBuffer[Any] = LeaseBuffer(capacity)
        self._changed = asyncio.Condition()

    async def put(self, items: list[Any], timeout_s: float) -> int:
        """Appends references (listed, so that Ray does not fetch them) as room comes; returns how many it came for."""
        end = time.monotonic() + timeout_s
        async with self._changed:
            for number, item in enumerate(items):
                if not await self._wait(partial(self._buffer.put, item), end - time.monotonic()):
                    return number
                self._changed.notify_all()
            return len(items)

    async def lease(self, timeout_s: float, duration_s: float, done: Sequence[int]) -> list[Lease[Any]]:
        """Acknowledges the leases `done`, waits for items and leases them for `duration_s`; none where none came.

        As many as there are, at most `at_once` of what the queue holds: the others are there for whoever fills it.
        """
        most = at_once(self._buffer.capacity)

        def take() -> list[Lease[Any]]:
            leases: list[Lease[Any]] = []
            while len(leases) < most and (lease := self._buffer.lease(now=time.monotonic(), duration=duration_s)):
                leases.append(lease)
            return leases

        async with self._changed:
            self._acknowledge(done)
            return await self._wait(take, timeout_s)

    async def acknowledge(self, lease_ids: Sequence[int]) -> list[bool]:
        """See `LeaseBuffer.acknowledge`."""
        async with self._changed:
            return self._acknowledge(lease_ids)

    async def redeliver(self, lease_id: int) -> bool:
        """See `LeaseBuffer.redeliver`."""
        async with self._changed:
            known = self._buffer.redeliver(lease_id)
            self._changed.notify_all()
            return known

    async def close(self) -> None:
        """See `LeaseBuffer.close`."""
        async with self._changed:
            self._buffer.close()
            self._changed.notify_all()

    async def size(self) -> int:
        """Items not yet acknowledged."""
        return len(self._buffer)

    def _acknowledge(self, lease_ids: Sequence[int]) -> list[bool]:
        """Whoever holds the lock makes room."""
        known = [self._buffer.acknowledge(lease_id) for lease_id in lease_ids]
        if known:
            self._changed.notify_all()
        return known

    async def _wait(self, attempt: Callable[[], Result], timeout_s: float) -> Result:
        """Tries until something comes of it or time is up. Wakes at least once a second: leases run out unannounced."""
        end = time.monotonic() + timeout_s
        while not (result := attempt()) and (left := end - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), min(left, 1.0))
        return result


class BatchQueue:
    """Handle of a queue of preference batches, usable from any process of the cluster.

    Args:
        actor: of `QueueActor`.
        deadline_s: of an answer, beside the wait that was asked for (`learner.step_deadline_s`).
        capacity: in batches.
    """

    def __init__(self, actor: Any, deadline_s: float, capacity: int) -> None:
        self.at_once = at_once(capacity)
        """Batches that are leased in one call at most, and had better be offered in one: a call costs a millisecond."""
        self._actor = actor
        self._deadline_s = deadline_s

    @classmethod
    def create(cls, capacity: int, *, deadline_s: float, runtime_env: Mapping[str, Any] | None = None) -> BatchQueue:
        """Starts the queue's actor, in an environment of Ray's, and does not wait for it."""
        options = {"num_cpus": 0, "max_concurrency": 64, "runtime_env": runtime_env}
        actor = actor_class(QueueActor).options(**options).remote(capacity)
        return cls(actor, deadline_s, capacity)

    def wait_ready(self, deadline_s: float) -> None:
        """Waits until the actor is up, for `learner.start_deadline_s`."""
        fetch(self._actor.size.remote(), what="queue: start", deadline_s=deadline_s, knob="learner.start_deadline_s")

    def put(self, ref: Any, *, timeout_s: float) -> bool:
        """Hands over the object reference of a batch, waiting for room; False when none came within `timeout_s`.

        Raises:
            QueueClosedError: the queue was closed.
        """
        return self.taken(self.offer([ref], timeout_s=timeout_s), timeout_s=timeout_s) == 1

    def offer(self, refs: Sequence[Any], *, timeout_s: float) -> Any:
        """Begins to hand over references, and leaves it to `taken` to wait: the next ones can be made meanwhile."""
        return self._actor.put.remote(list(refs), timeout_s)

    def taken(self, offer: Any, *, timeout_s: float) -> int:
        """How many of an offer, the first ones, found room. Raises what `put` raises."""
        return int(self._call(offer, "put", timeout_s))

    def lease(self, *, timeout_s: float, duration_s: float, done: Sequence[int] = ()) -> list[Lease[Any]]:
        """Waits for references of batches, redelivered unless acknowledged within `duration_s`.

        Args:
            timeout_s: of the wait.
            duration_s: of the leases.
            done: leases that are acknowledged on the way, which saves a call.

        Returns:
            Those that are there, in order, at most `at_once`; none where none came.

        Raises:
            QueueClosedError: the queue was closed and is empty.
        """
        reply = self._actor.lease.remote(timeout_s, duration_s, done)
        leases: list[Lease[Any]] = self._call(reply, "lease", timeout_s)
        return leases

    def acknowledge(self, lease_ids: Sequence[int]) -> list[bool]:
        """Says that batches were trained on; False of one whose lease had run out."""
        known: list[bool] = self._call(self._actor.acknowledge.remote(lease_ids), "acknowledge")
        return known

    def redeliver(self, lease_id: int) -> bool:
        """Gives a batch back."""
        return bool(self._call(self._actor.redeliver.remote(lease_id), "redeliver"))

    def close(self) -> None:
        """No more batches will come."""
        self._call(self._actor.close.remote(), "close")

    def size(self) -> int:
        """Batches not yet acknowledged."""
        return int(self._call(self._actor.size.remote(), "size"))

    def end(self) -> None:
        """Ends the actor; what it holds is forgotten."""
        ray.kill(self._actor)

    def _call(self, ref: Any, verb: str, waits_s: float = 0.0) -> Any:
        deadline_s = waits_s + self._deadline_s
        return fetch(ref, what=f"queue: {verb}", deadline_s=deadline_s, knob="learner.step_deadline_s")
