"""A wait that lasts is reported with whom it waits for, where that one runs and what it does."""

import math
import os
import signal
import threading
import time

import pytest
import ray

from orchestrator.errors import DeadlineError
from orchestrator.events import EventKind
from orchestrator.pools import ActorPool
from orchestrator.remote import fetch
from orchestrator.stacks import Observable
from orchestrator.waits import underway
from orchestrator.watchdog import Watchdog


class Worker(Observable):
    def ready(self):
        return os.getpid()

    def work(self, numbers):
        for number in numbers:
            if number < 0:
                self.turn_in_circles(-number)
        return numbers

    def turn_in_circles(self, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            sum(range(1000))


@pytest.fixture
def pool(ray_cluster):
    def make(index):
        return ray.remote(Worker).options(num_cpus=0.1, max_concurrency=2).remote()

    pool = ActorPool(role="worker", make=make, num_actors=2, restarts=0, start_deadline_s=60)
    pool.wait_ready()
    return pool


class Told:
    """Keeps events; the first that is a stall is waited for."""

    def __init__(self, on_stall=lambda: None):
        self.stalls, self.first, self._on_stall = [], threading.Event(), on_stall

    def __call__(self, event):
        assert event.kind is EventKind.STALLED
        self.stalls.append(event)
        if not self.first.is_set():
            self.first.set()
            self._on_stall()


def work(pool, numbers, deadline_s=60):
    return pool.map(
        lambda actor, share: actor.work.remote(share),
        numbers,
        what="counting",
        deadline_s=deadline_s,
        knob="count.knob",
    )


def test_an_actor_that_is_stopped_is_named_and_the_work_goes_on_with_it(pool):
    where = pool.slots[1].where
    told = Told(on_stall=lambda: os.kill(where.pid, signal.SIGCONT))
    os.kill(where.pid, signal.SIGSTOP)
    with Watchdog(told, stall_s=1):
        assert work(pool, [1, 2, 3, 4]) == [1, 2, 3, 4]
    stall = told.stalls[0]
    assert (stall.role, stall.actor, stall.node, stall.failure) == ("worker", "worker-1", where.node, "infrastructure")
    assert f"worker-1 (pid {where.pid} on {where.node}), which does not answer within 5 s" in stall.text
    assert "counting: waiting for" in stall.text
    assert "deadline is 60 s (count.knob)" in stall.text
    assert "worker-0" not in stall.text
    assert underway() == []


def test_an_actor_that_is_busy_shows_where_it_is(pool):
    told = Told()
    began = time.monotonic()
    with Watchdog(told, stall_s=1):
        assert work(pool, [-4, 2]) == [-4, 2]
    took_s = time.monotonic() - began
    text = told.stalls[0].text
    assert f"worker-0 (pid {pool.slots[0].where.pid} on" in text
    assert "in turn_in_circles" in text
    # Told after one second, and again each time that its age has doubled.
    assert 1 <= len(told.stalls) <= 1 + math.log2(took_s)


def test_a_deadline_names_the_process_that_owes_the_answer(pool):
    ref = pool.actors[1].work.remote([-2])
    with pytest.raises(DeadlineError, match=rf"within 0\.5 s from worker-1 \(pid {pool.slots[1].where.pid} on"):
        fetch(ref, what="counting", deadline_s=0.5, knob="count.knob")
