"""The queue loses nothing, repeats nothing that was acknowledged, and keeps its bound."""

import numpy as np
import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from orchestrator.errors import QueueClosedError
from orchestrator.queues import BatchQueue, LeaseBuffer

DURATION = 10.0


class LeaseBufferMachine(RuleBasedStateMachine):
    """Holds the buffer against a model of three sets: queued, leased, acknowledged."""

    def __init__(self):
        super().__init__()
        self.buffer = LeaseBuffer(capacity=3)
        self.now = 0.0
        self.accepted = []
        self.leased = {}
        self.acknowledged = []

    @rule()
    def put(self):
        if self.buffer.closed:
            with pytest.raises(QueueClosedError):
                self.buffer.put(object())
            return
        item = len(self.accepted)
        has_room = len(self.accepted) - len(self.acknowledged) < self.buffer.capacity
        assert self.buffer.put(item) is has_room
        if has_room:
            self.accepted.append(item)

    def queued(self):
        self.leased = {i: lease for i, lease in self.leased.items() if lease.expires_at > self.now}
        held = {lease.item for lease in self.leased.values()}
        return [item for item in self.accepted if item not in held and item not in self.acknowledged]

    @rule()
    def lease(self):
        queued = self.queued()
        if self.buffer.closed and not queued and not self.leased:
            with pytest.raises(QueueClosedError):
                self.buffer.lease(now=self.now, duration=DURATION)
            return
        lease = self.buffer.lease(now=self.now, duration=DURATION)
        if not queued:
            assert lease is None
            return
        assert lease.item == queued[0], "first in, first out, redelivered ones first"
        self.leased[lease.id] = lease

    @precondition(lambda self: self.leased)
    @rule(data=st.data())
    def acknowledge(self, data):
        lease = self.leased.pop(data.draw(st.sampled_from(sorted(self.leased))))
        if self.buffer.acknowledge(lease.id):
            self.acknowledged.append(lease.item)
        else:
            assert lease.expires_at <= self.now, "only a lease that ran out is refused"

    @precondition(lambda self: self.leased)
    @rule(data=st.data())
    def give_back(self, data):
        self.buffer.redeliver(self.leased.pop(data.draw(st.sampled_from(sorted(self.leased)))).id)

    @rule(seconds=st.sampled_from([1.0, 6.0, 20.0]))
    def time_passes(self, seconds):
        self.now += seconds
        self.buffer.redeliver_expired(self.now)

    @rule()
    @precondition(lambda self: len(self.accepted) > 6)
    def close(self):
        self.buffer.close()

    @invariant()
    def nothing_is_lost_or_over_the_bound(self):
        assert len(self.buffer) == len(self.accepted) - len(self.acknowledged) <= self.buffer.capacity
        assert len(set(self.acknowledged)) == len(self.acknowledged)


TestLeaseBuffer = LeaseBufferMachine.TestCase
TestLeaseBuffer.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(order=st.permutations(range(5)))
def test_redelivered_items_keep_their_order(order):
    buffer = LeaseBuffer(capacity=5)
    for item in range(5):
        buffer.put(item)
    leases = [buffer.lease(now=0, duration=1) for _ in range(5)]
    for index in order:
        buffer.redeliver(leases[index].id)
    assert [buffer.lease(now=0, duration=1).item for _ in range(5)] == [0, 1, 2, 3, 4]


def test_attempts_are_counted():
    buffer = LeaseBuffer(capacity=1)
    buffer.put("batch")
    assert buffer.lease(now=0, duration=1).attempt == 1
    assert buffer.lease(now=1, duration=1).attempt == 2


def test_capacity_must_be_positive():
    with pytest.raises(ValueError, match="at least 1, found 0"):
        LeaseBuffer(capacity=0)


def test_batches_pass_through_ray_zero_copy_with_back_pressure(ray_cluster):
    queue = BatchQueue.create(2, deadline_s=30)
    columns = {"tokens": np.arange(100_000, dtype=np.int32)}
    refs = [ray.put(columns) for _ in range(3)]
    assert queue.put(refs[0], timeout_s=5)
    assert queue.put(refs[1], timeout_s=5)
    assert not queue.put(refs[2], timeout_s=0.2), "full: queued and leased count against the capacity"
    (lease,) = queue.lease(timeout_s=5, duration_s=60)
    tokens = ray.get(lease.item)["tokens"]
    assert not tokens.flags.writeable, "a view of the object store, not a copy"
    assert not queue.put(refs[2], timeout_s=0.2)
    assert queue.acknowledge([lease.id]) == [True]
    assert queue.put(refs[2], timeout_s=5)
    (second,) = queue.lease(timeout_s=5, duration_s=0)
    (again,) = queue.lease(timeout_s=5, duration_s=60)
    assert again.item == refs[1], "a lease that ran out is delivered again"
    assert queue.acknowledge([second.id + 1000]) == [False]
    (third,) = queue.lease(timeout_s=5, duration_s=60)
    assert third.item == refs[2]
    assert queue.lease(timeout_s=0.2, duration_s=60) == []
    queue.close()
    with pytest.raises(QueueClosedError):
        queue.put(refs[0], timeout_s=1)
    assert queue.size() == 2


def test_a_lease_makes_room_for_an_offer_by_what_is_done(ray_cluster):
    queue = BatchQueue.create(1, deadline_s=30)
    refs = [ray.put(number) for number in range(3)]
    assert queue.put(refs[0], timeout_s=5)
    (first,) = queue.lease(timeout_s=5, duration_s=60)
    offer = queue.offer([refs[1]], timeout_s=30)
    assert not ray.wait([offer], timeout=0.2)[0], "full"
    (second,) = queue.lease(timeout_s=5, duration_s=60, done=[first.id])
    assert second.item == refs[1]
    assert queue.taken(offer, timeout_s=5)
    assert queue.lease(timeout_s=0.1, duration_s=60, done=[first.id]) == [], "done twice is done once"
    assert queue.size() == 1
    assert queue.lease(timeout_s=0.1, duration_s=60, done=[second.id]) == []
    assert queue.size() == 0
    assert queue.taken(queue.offer([refs[2]], timeout_s=5), timeout_s=5) == 1


def test_an_offer_is_taken_as_far_as_there_is_room_in_order(ray_cluster):
    queue = BatchQueue.create(2, deadline_s=30)
    refs = [ray.put(number) for number in range(5)]
    assert queue.taken(queue.offer(refs[:3], timeout_s=0.2), timeout_s=5) == 2, "two found room"
    rest = queue.offer(refs[2:], timeout_s=30)
    seen = []
    while len(seen) < len(refs):
        (lease,) = queue.lease(timeout_s=5, duration_s=60)
        seen.append(lease.item)
        queue.acknowledge([lease.id])
    assert seen == refs, "what is offered while it waits for room comes as room does, behind what came before"
    assert queue.taken(rest, timeout_s=5) == 3


@pytest.mark.parametrize(("capacity", "sizes"), [(1, [1]), (3, [1, 1, 1]), (5, [2, 2, 1])])
def test_half_of_the_capacity_is_leased_at_once_in_order(ray_cluster, capacity, sizes):
    queue = BatchQueue.create(capacity, deadline_s=30)
    refs = [ray.put(number) for number in range(capacity)]
    assert all(queue.put(ref, timeout_s=5) for ref in refs)
    leases = [queue.lease(timeout_s=5, duration_s=60) for _ in sizes]
    assert [len(some) for some in leases] == sizes
    assert [lease.item for some in leases for lease in some] == refs
    assert queue.acknowledge([lease.id for some in leases for lease in some]) == [True] * capacity
    assert queue.size() == 0
