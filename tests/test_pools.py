"""A pool gives each item one result in its place, whoever dies; and says who died when it gives up."""

import os
import signal
import time

import pytest
import ray

from orchestrator.errors import ConfigError, DeadlineError, PoolError
from orchestrator.pools import ActorPool


class Worker:
    """Squares numbers, once somebody has told it the version. A negative number kills it, the first time it is seen."""

    def __init__(self, index, graves):
        self.index, self.graves, self.version = index, graves, None

    def ready(self):
        return os.getpid()

    def learn(self, version):
        self.version = version
        return version

    def work(self, numbers):
        for number in numbers:
            grave = self.graves / str(number)
            if number < 0 and not grave.exists():
                grave.touch()
                os._exit(1)
            if number == 13:
                raise ConfigError("thirteen is refused")
            if number == 99:
                time.sleep(60)
        return [(number * number, self.version) for number in numbers]


class StillBorn:
    def __init__(self):
        raise ValueError("no weights here")

    def ready(self):
        return 0


@pytest.fixture
def pool(ray_cluster, tmp_path):
    def make(index):
        return ray.remote(Worker).options(num_cpus=0.1).remote(index, tmp_path)

    pool = ActorPool(role="worker", make=make, num_actors=3, restarts=3, start_deadline_s=60)
    pool.wait_ready()
    pool.on_start = lambda actor: actor.learn.remote("v2")
    pool.broadcast(lambda actor: actor.learn.remote("v1"), what="learn", deadline_s=30, knob="x")
    return pool


def work(pool, numbers, deadline_s=30):
    return pool.map(
        lambda actor, share: actor.work.remote(share), numbers, what="squaring", deadline_s=deadline_s, knob="pool.knob"
    )


def test_results_stand_in_the_place_of_their_items(pool):
    assert work(pool, []) == []
    assert work(pool, [5]) == [(25, "v1")]
    assert work(pool, list(range(10))) == [(number * number, "v1") for number in range(10)]


def test_the_dead_are_replaced_brought_up_to_date_and_asked_again(pool):
    results = work(pool, [1, 2, 3, 4, -5, 6, 7])
    assert [value for value, _ in results] == [1, 4, 9, 16, 25, 36, 49]
    assert [version for _, version in results] == ["v1", "v2", "v1", "v1", "v2", "v1", "v1"]
    assert pool.restarts_left == 2


def test_a_broadcast_reaches_replacements(pool):
    for actor in pool.actors[:2]:
        os.kill(ray.get(actor.ready.remote()), signal.SIGKILL)
    answers = pool.broadcast(lambda actor: actor.learn.remote("v3"), what="learn", deadline_s=60, knob="x")
    assert answers == ["v3"] * 3
    assert pool.restarts_left == 1


def test_a_used_up_budget_names_the_dead(pool):
    pool.restarts_left = 1
    with pytest.raises(PoolError, match=r"worker-1 died and the restart budget \(worker.restarts\) is used up"):
        work(pool, [0, -1, 0, 0, -2])


def test_a_late_answer_names_who_owes_it_and_the_key(pool):
    with pytest.raises(DeadlineError, match=r"squaring: worker-2 did not answer within 2 s\. Raise pool\.knob"):
        work(pool, [0, 1, 99], deadline_s=2)


def test_an_error_of_the_project_arrives_as_itself(pool):
    with pytest.raises(ConfigError, match="thirteen is refused"):
        work(pool, [13])


def test_an_actor_that_cannot_start_is_not_tried_again(ray_cluster):
    made = []

    def make(index):
        made.append(index)
        return ray.remote(StillBorn).options(num_cpus=0.1).remote()

    pool = ActorPool(role="worker", make=make, num_actors=1, restarts=3, start_deadline_s=60)
    with pytest.raises(PoolError, match=r"could not start: worker-0: start: .*no weights here"):
        pool.wait_ready()
    assert made == [0]
