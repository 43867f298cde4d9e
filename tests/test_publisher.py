"""Weights find another way where memory cannot be shared, and only there."""

import os
import subprocess
from threading import Event, RLock, Thread, Timer

import pytest
import ray

from conf.schema import ClusterConfig
from orchestrator.errors import ActorLostError, UnsettledError, WeightsLostError
from orchestrator.pools import ActorPool
from orchestrator.publisher import Publisher
from orchestrator.rollouts import Roles
from orchestrator.shared_memory import SharedSlots
from orchestrator.stacks import Observable
from orchestrator.types import PolicyVersion
from orchestrator.weights import Probe, Publication

PROBE = Probe(token_ids=(), logprobs=(), tolerance=0.0)


def publication(number, *, shared):
    version = PolicyVersion(number=number, digest="0" * 16)
    return Publication(version=version, records=(), buckets=() if shared else (b"",), probe=PROBE, shared=shared)


class FakeLearner:
    """Shares memory that is there or, as in a container of its own, that others do not see."""

    def __init__(self, hidden):
        self.hidden, self.asked, self.slots = hidden, [], SharedSlots()

    def publish(self, number, receivers, nodes, deadline_s):
        self.asked.append(nodes)
        _, place = self.slots.take(8)
        if self.hidden:
            done = subprocess.Popen(["true"])
            done.wait()
            place = type(place)(pid=done.pid, born="never", descriptor=0, serial=1, num_bytes=8)
        return publication(number, shared=place if nodes else None)

    def asked_for(self):
        return self.asked

    def die(self):
        os._exit(1)


class FakeGenerator:
    def update_weights(self, published, deadline_s):
        if published.shared is not None:
            published.shared.open()

    def ready(self):
        return 0


class Pool:
    """As much of an `ActorPool` as a publisher needs."""

    def __init__(self):
        self.still = RLock()
        self.actors, self.nodes = [ray.remote(num_cpus=0)(FakeGenerator).remote()], ["node"]

    def vacate(self, actors, why):
        assert not actors

    def broadcast(self, call, *, what, deadline_s, knob):
        from orchestrator.remote import fetch

        return [fetch(call(actor), what=what, deadline_s=deadline_s, knob=knob) for actor in self.actors]


class Learning:
    def __init__(self, actor):
        self.actor, self.version, self.has_moved, self.alone = actor, 0, False, RLock()

    def now_at(self, version):
        self.version, self.has_moved = version, False

    def surviving(self, action):
        return action()


class Accounts:
    def publish(self, version, iteration):
        pass


def make(hidden, transport="object_store"):
    learner = Learning(ray.remote(num_cpus=0)(FakeLearner).remote(hidden))
    roles = Roles(generators=Pool(), scorers={}, judges=None, learner=learner)
    return Publisher(
        roles, Accounts(), ClusterConfig(publish_deadline_s=20.0, weight_transport=transport)
    ), learner.actor


def test_memory_is_shared_where_it_can_be_read(ray_cluster):
    publisher, learner = make(hidden=False)
    for number in (1, 2):
        assert publisher.publish(number, number).number == number
    assert ray.get(learner.asked_for.remote()) == [["node"]] * 2


def test_weights_are_laid_where_a_generator_reads_them_that_took_the_place_of_a_dead_one(ray_cluster):
    """On another node: it is found dead while the learner lays them out for those that were there."""
    publisher, learner = make(hidden=False)
    pool = publisher._roles.generators
    broadcast = pool.broadcast

    def replace(call, *, what, **options):
        if what == "sign of life":
            pool.nodes = ["node", "other"]
        return broadcast(call, what=what, **options)

    pool.broadcast = replace
    assert publisher.publish(1, 1).number == 1
    assert ray.get(learner.asked_for.remote()) == [["node"], ["node", "other"]]


class HoldingGenerator(Observable):
    """Knows which weights it has."""

    holds = None

    def update_weights(self, published, deadline_s):
        self.holds = published.version.number

    def ready(self):
        return os.getpid()

    def die(self):
        os._exit(1)

    def work(self, items):
        return [self.holds for _ in items]


def test_a_generator_that_was_started_while_the_learner_died_does_not_work_without_weights(ray_cluster):
    """Both died, and with the learner what was published: nothing is left for who took the generator's place."""

    def start(index):
        return ray.remote(num_cpus=0)(HoldingGenerator).options(max_concurrency=2).remote()

    pool = ActorPool(role="generator", make=start, num_actors=2, restarts=3, start_deadline_s=30)
    pool.wait_ready()
    learner = Learning(ray.remote(num_cpus=0)(FakeLearner).remote(False))
    publisher = Publisher(Roles(generators=pool, scorers={}, judges=None, learner=learner), Accounts(), ClusterConfig())

    def held():
        return set(pool.map(lambda actor, items: actor.work.remote(items), [0] * 4, what="w", deadline_s=30, knob="k"))

    def die_ahead(action):
        learner.actor.die.remote()
        try:
            return action()
        except ActorLostError as error:
            learner.has_moved = True
            raise UnsettledError("the learner died") from error

    publisher.publish(1, 1)
    assert held() == {1}
    pool.actors[0].die.remote()
    learner.surviving = die_ahead
    with pytest.raises(UnsettledError):
        publisher.publish(2, 2)
    assert held() == {1}, "by the other one"
    learner.actor = ray.remote(num_cpus=0)(FakeLearner).remote(False)
    learner.surviving = lambda action: action()
    publisher.publish(3, 3)
    assert held() == {3}
    assert len(pool.actors) == 2


@pytest.mark.parametrize("transport", ["object_store", "nccl"])
def test_dead_generators_are_replaced_before_any_weights_are_sent_to_them(ray_cluster, transport):
    publisher, learner = make(hidden=False, transport=transport)
    pool, asked = publisher._roles.generators, []
    broadcast = pool.broadcast

    def note(call, *, what, **options):
        asked.append((what.split()[0], len(ray.get(learner.asked_for.remote()))))
        return broadcast(call, what=what, **options)

    pool.broadcast = note
    publisher.publish(1, 1)
    assert asked == [("sign", int(transport == "object_store")), ("load", 1)]


def test_weights_that_die_with_their_learner_as_they_are_published_leave_the_ones_before(ray_cluster, monkeypatch):
    """So that a generator which is started before the next ones waits for them, and does not answer without any."""
    publisher, _ = make(hidden=False)
    before = publisher.publish(1, 1)

    def die(action):
        action()
        raise UnsettledError("the learner died")

    monkeypatch.setattr(publisher._roles.learner, "surviving", die)
    with pytest.raises(UnsettledError):
        publisher.publish(2, 2)
    assert publisher.is_published
    assert publisher.version == before


def test_what_cannot_be_read_goes_another_way_from_then_on(ray_cluster):
    publisher, learner = make(hidden=True)
    for number in (1, 2):
        assert publisher.publish(number, number).number == number
    assert ray.get(learner.asked_for.remote()) == [["node"], None, None]


def test_memory_that_died_with_its_learner_is_the_learners_death(ray_cluster):
    """And sharing goes on with the next one."""
    publisher, learner = make(hidden=False)
    publisher.publish(1, 1)
    learner.die.remote()
    with pytest.raises(ActorLostError):
        publisher.publish(2, 2)
    assert not publisher.is_published
    assert publisher._shares


@pytest.mark.parametrize("has_moved", [False, True])
def test_weights_whose_memory_is_gone_are_published_again_unless_the_learner_has_gone_on(ray_cluster, has_moved):
    """What it has now is not what is asked for."""
    publisher, learner = make(hidden=False)
    publisher.publish(1, 1)
    publisher._current = publication(
        1, shared=type(publisher._current.shared)(pid=1, born="never", descriptor=9, serial=1, num_bytes=8)
    )
    publisher._roles.learner.has_moved = has_moved
    (generator,) = publisher._roles.generators.actors
    if has_moved:
        with pytest.raises(WeightsLostError, match=r"weights v1-0+ are lost, and the learner has gone on"):
            publisher._bring_up_to_date(generator)
    else:
        publisher._bring_up_to_date(generator)
    assert len(ray.get(learner.asked_for.remote())) == (1 if has_moved else 2)


def test_weights_that_leave_nothing_are_sent_to_all_again(ray_cluster):
    """NCCL and IPC make every generator wait for a proof, which all of them must get."""
    publisher, _ = make(hidden=False)
    publisher.publish(1, 1)
    publisher._current = Publication(version=publisher.version, records=(), buckets=(), probe=PROBE)
    asked = []
    pool = publisher._roles.generators
    broadcast = pool.broadcast
    pool.broadcast = lambda call, **options: asked.append(options["what"]) or broadcast(call, **options)
    publisher._bring_up_to_date(pool.actors[0])
    assert [what.split()[0] for what in asked] == ["sign", "load"]


def test_a_learner_that_is_being_trained_is_not_waited_for(ray_cluster):
    """Whoever trains it may be waiting for what the generator is to sample."""
    publisher, _ = make(hidden=False)
    publisher.publish(1, 1)
    publisher._current = publication(
        1, shared=type(publisher._current.shared)(pid=1, born="never", descriptor=9, serial=1, num_bytes=8)
    )
    learner, taken, over = publisher._roles.learner, Event(), Event()

    def train():
        with learner.alone:
            taken.set()
            over.wait(60)

    thread = Thread(target=train)
    thread.start()
    assert taken.wait(10)
    Timer(1.0, lambda: setattr(learner, "has_moved", True)).start()
    with pytest.raises(WeightsLostError):
        publisher._bring_up_to_date(publisher._roles.generators.actors[0])
    over.set()
    thread.join(10)
