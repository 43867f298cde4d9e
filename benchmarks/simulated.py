"""A cluster of generators and a learner that exist only in time, under a clock that jumps from event to event.

    real: Rollouts -> ActorPool -> Dispatch           LeaseBuffer
               | calls, waits  ^ answers, deaths         | leases, acknowledgements
    simulated: generators (how long completions take, when one dies) and a learner (how long a step takes)

The code that is tried sees `World` where it would see Ray and the clock. What it computes takes as long as it takes
here, and passes on the simulated clock as well; a call of Ray is charged what it costs (`CALL_S`, `GET_S`, `WAIT_S`).
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections import deque
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
from ray.exceptions import ActorDiedError, GetTimeoutError

from orchestrator import dispatch, pace, pools, remote, rollouts
from orchestrator.queues import LeaseBuffer
from orchestrator.stacks import Where
from orchestrator.types import Completion, FinishReason, PolicyVersion
from orchestrator.waits import forget_everybody

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from orchestrator.types import GenerationRequest

CALL_S, GET_S, WAIT_S = 110e-6, 12e-6, 1.1e-6
"""Processor time that Ray takes in the caller (measured with 2.56): for a call of an actor, a small answer, a wait by
reference."""

_MODULES = (dispatch, pools, pace, remote, rollouts)
_VERSION = PolicyVersion(number=0, digest="0" * 16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Speeds:
    """How long things take, seconds, and how long completions are, tokens."""

    token_s: float = 0.02
    """One decoding step of a generator, however many completions it decodes at once."""
    tokens: float = 250.0
    """Median length; the logarithm has a standard deviation of `spread`."""
    spread: float = 1.0
    max_tokens: int = 2048
    life_s: float = 100 * 3600.0
    """Mean time between the deaths of one generator."""
    start_s: float = 30.0
    """Of a generator in place of a dead one."""
    learn_s: float = 60.0
    """The learner's steps of one iteration."""
    publish_s: float = 1.0


class Ref:
    """An answer that comes."""

    __slots__ = ("done", "error", "value", "watchers")

    def __init__(self) -> None:
        self.done = False
        self.value: Any = None
        self.error: Exception | None = None
        self.watchers: list[list[int]] = []
        """Counters of answers that are still missed."""


class World:
    """The clock, the events to come, and what stands in for the modules `ray` and `time`."""

    def __init__(self, speeds: Speeds, seed: int = 0) -> None:
        self.speeds = speeds
        self.random = np.random.default_rng(seed)
        self.controller_s = 0.0
        """Processor time of the code that is tried, what Ray takes for it included."""
        self.looks = 0
        """References that were waited for, counted again for each wait."""
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._entered = time.thread_time()
        self.ray = SimpleNamespace(wait=self._wait, get=self._get, kill=lambda actor: actor.end(), nodes=_nodes)
        self.time = SimpleNamespace(monotonic=self.now)

    def now(self) -> float:
        """Seconds."""
        return self._now + time.thread_time() - self._entered

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        """Something happens later."""
        heapq.heappush(self._events, (self._now + seconds, next(self._order), event))

    @contextmanager
    def outside(self, charge_s: float = 0.0) -> Iterator[None]:
        """The block is none of the controller's work; `charge_s` is."""
        worked = time.thread_time() - self._entered + charge_s
        self._now += worked
        self.controller_s += worked
        try:
            yield
        finally:
            self._entered = time.thread_time()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """The block, within an event, is the controller's work."""
        start = time.thread_time()
        try:
            yield
        finally:
            self.controller_s += time.thread_time() - start

    def run_until(self, holds: Callable[[], bool]) -> None:
        """Nothing to do for the controller until then."""
        with self.outside():
            while not holds():
                self._step()

    def answer(self, ref: Ref, value: Any = None, error: Exception | None = None) -> None:
        """An answer comes."""
        ref.done, ref.value, ref.error = True, value, error
        for missed in ref.watchers:
            missed[0] -= 1
        ref.watchers.clear()

    def _step(self) -> None:
        at, _, event = heapq.heappop(self._events)
        self._now = max(self._now, at)
        event()

    def _wait(
        self, refs: Sequence[Ref], *, num_returns: int = 1, timeout: float | None = None
    ) -> tuple[list[Ref], list[Ref]]:
        with self.outside(WAIT_S * len(refs)):
            self.looks += len(refs)
            end = float("inf") if timeout is None else self._now + timeout
            missed = [num_returns - sum(ref.done for ref in refs)]
            for ref in refs:
                if not ref.done:
                    ref.watchers.append(missed)
            while missed[0] > 0 and self._events and self._events[0][0] <= end:
                self._step()
            if missed[0] > 0:
                self._now = max(self._now, end)
            for ref in refs:
                if missed in ref.watchers:
                    ref.watchers.remove(missed)
            ready = list(itertools.islice((ref for ref in refs if ref.done), num_returns))
            known = set(map(id, ready))
            return ready, [ref for ref in refs if id(ref) not in known]

    def _get(self, refs: Ref | list[Ref], timeout: float | None = None) -> Any:
        asked = refs if isinstance(refs, list) else [refs]
        ready, _ = self._wait(asked, num_returns=len(asked), timeout=timeout)
        if len(ready) < len(asked):
            raise GetTimeoutError
        with self.outside(GET_S * len(asked)):
            for ref in asked:
                if ref.error is not None:
                    raise ref.error
        values = [ref.value for ref in asked]
        return values if isinstance(refs, list) else values[0]


class Generator:
    """Answers as an actor's handle does, when its completions would be there; dies now and then.

    Args:
        world: its clock.
        index: its slot's.
        slowness: times as long as others take.
    """

    def __init__(self, world: World, index: int, slowness: float = 1.0) -> None:
        self.asked = 0
        """Items of all calls."""
        self.given_up = 0
        """Items that it was told nobody waits for any more."""
        self._world = world
        self._slowness = slowness
        self._dead = False
        self._owed: set[Ref] = set()
        self._actor_id = SimpleNamespace(hex=lambda: f"{id(self):x}")
        self._up_at = world.now() + (world.speeds.start_s if world.now() > 0 else 0.0)
        where = Where(pid=index, node="simulated", node_id="simulated")
        self.ready = self._method(lambda: max(0.0, self._up_at - world.now()), lambda: index)
        self.where = self._method(lambda: max(0.0, self._up_at - world.now()), lambda: where)
        self.generated = self._method(lambda: 0.0, lambda: (0, 0))
        self.generate = self._method(self._takes, self._complete)
        self.abort = self._method(self._abort, lambda _: None)
        world.after(float(world.random.exponential(world.speeds.life_s)), self.end)

    def grow_slow(self, slowness: float) -> None:
        """What it is asked from now on takes so many times as long as elsewhere."""
        self._slowness = slowness

    def end(self) -> None:
        """It dies; who waits for it is told."""
        self._dead = True
        for ref in self._owed:
            self._world.answer(ref, error=ActorDiedError())
        self._owed.clear()

    def _method(self, takes: Callable[..., float], value: Callable[..., Any]) -> Any:
        def call(*arguments: Any) -> Ref:
            world, ref = self._world, Ref()
            with world.outside(CALL_S):
                if self._dead:
                    world.answer(ref, error=ActorDiedError())
                else:
                    self._owed.add(ref)
                    world.after(takes(*arguments), lambda: self._give(ref, lambda: value(*arguments)))
            return ref

        return SimpleNamespace(remote=call)

    def _give(self, ref: Ref, value: Callable[[], Any]) -> None:
        if ref in self._owed:
            self._owed.remove(ref)
            self._world.answer(ref, value())

    def _takes(self, requests: Sequence[GenerationRequest]) -> float:
        speeds = self._world.speeds
        lengths = speeds.tokens * np.exp(speeds.spread * self._world.random.standard_normal(len(requests)))
        self.asked += len(requests)
        return float(min(lengths.max(), speeds.max_tokens)) * speeds.token_s * self._slowness

    def _abort(self, requests: Sequence[object]) -> float:
        self.given_up += len(requests)
        return 0.0

    def _complete(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        made = Completion(token_ids=(1,), text="", logprobs=(0.0,), finish_reason=FinishReason.EOS, policy=_VERSION)
        return [made for _ in requests]


class Learner:
    """Takes batches from the real queue, one after the other, and is fed as there is room, an iteration at a time.

    Args:
        world: its clock.
        capacity: of the queue.
    """

    def __init__(self, world: World, capacity: int) -> None:
        self.finished = 0
        """Iterations whose weights are published."""
        self.busy: list[tuple[float, float]] = []
        """When steps began and ended."""
        self.batches = 0
        self._world = world
        self._buffer: LeaseBuffer[int] = LeaseBuffer(capacity)
        self._ready: deque[int] = deque()
        """Batches of the iterations that are collected."""
        self._to_put = self._to_learn = self._of_iteration = 0

    def has_finished(self, iteration: int) -> bool:
        """Whether the weights of an iteration are published."""
        return self.finished >= iteration

    def offer(self, batches: int) -> None:
        """An iteration is collected."""
        self._ready.append(batches)
        self._begin()

    def _begin(self) -> None:
        if self._to_learn == 0 and self._ready:
            self._to_put = self._to_learn = self._of_iteration = self._ready.popleft()
            self._feed()
            self._learn()

    def _feed(self) -> None:
        with self._world.inside():
            while self._to_put and self._buffer.put(self._to_put):
                self._to_put -= 1

    def _learn(self) -> None:
        step_s = self._world.speeds.learn_s / self._of_iteration
        with self._world.inside():
            lease = self._buffer.lease(now=self._world.now(), duration=600.0)
        assert lease is not None
        start = self._world.now()

        def done() -> None:
            with self._world.inside():
                self._buffer.acknowledge(lease.id)
            self.busy.append((start, self._world.now()))
            self.batches += 1
            self._to_learn -= 1
            if self._to_learn:
                self._feed()
                self._learn()
            else:
                self._to_learn = -1  # its weights are on the way: nothing begins
                self._world.after(self._world.speeds.publish_s, self._publish)

        self._world.after(step_s, done)

    def _publish(self) -> None:
        self.finished += 1
        self._to_learn = 0
        self._begin()


@contextmanager
def simulated(world: World) -> Iterator[None]:
    """Within the block the modules that are tried see the world; its actors are forgotten behind it."""
    with ExitStack() as stack:
        stack.callback(forget_everybody)
        for module in _MODULES:
            for name in ("ray", "time"):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, getattr(world, name)))
        yield


def _nodes() -> list[dict[str, Any]]:
    return [{"NodeID": "simulated", "Alive": True}]
