"""A pool gives each item one result in its place, whoever dies; and says who died when it gives up."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray

from orchestrator.blame import Poisoned
from orchestrator.errors import ConfigError, DeadlineError, PoolError, WeightsLostError
from orchestrator.events import EventKind
from orchestrator.pools import ActorPool
from orchestrator.speculation import Speculation
from orchestrator.stacks import Observable


class Worker(Observable):
    """Squares numbers, once somebody has told it the version. A negative number kills it, the first time it is seen;
    666 each time."""

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
            if number == 666:
                os._exit(1)
            if number == 13:
                raise ConfigError("thirteen is refused")
            if number == 99 or (number == 77 and self.index == 0):
                time.sleep(60)
        return [(number * number, self.version) for number in numbers]


class StillBorn(Observable):
    def __init__(self):
        raise ValueError("no weights here")

    def ready(self):
        return 0


def make_pool(graves, num_actors, **options):
    events = []

    def make(index):
        return ray.remote(Worker).options(num_cpus=0.1).remote(index, graves)

    options = {"make": make, "restarts": 3, "start_deadline_s": 60} | options
    pool = ActorPool(role="worker", num_actors=num_actors, emit=events.append, **options)
    pool.wait_ready()
    return pool, events


@pytest.fixture
def pool(ray_cluster, tmp_path):
    pool, _ = make_pool(tmp_path, 3)
    pool.on_start = lambda actor: ray.get(actor.learn.remote("v2"), timeout=60)
    pool.broadcast(lambda actor: actor.learn.remote("v1"), what="learn", deadline_s=30, knob="x")
    return pool


def work(pool, numbers, deadline_s=30, **options):
    return pool.map(
        lambda actor, share: actor.work.remote(share),
        numbers,
        what="squaring",
        deadline_s=deadline_s,
        knob="pool.knob",
        **options,
    )


def squares(numbers):
    return [(number * number, None) for number in numbers]


def kinds(events):
    return [event.kind.value for event in events]


def test_results_stand_in_the_place_of_their_items(pool):
    assert work(pool, []) == []
    assert work(pool, [5]) == [(25, "v1")]
    assert work(pool, list(range(10))) == [(number * number, "v1") for number in range(10)]


def test_the_dead_are_replaced_brought_up_to_date_and_asked_again(pool):
    results = work(pool, [1, 2, 3, 4, -5, 6, 7])
    assert [value for value, _ in results] == [1, 4, 9, 16, 25, 36, 49]
    assert [version for _, version in results] == ["v1", "v1", "v1", "v2", "v2", "v1", "v1"]
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
        work(pool, [0, 0, -1, -2, 0])


def test_a_late_answer_names_who_owes_it_and_the_key(pool):
    with pytest.raises(
        DeadlineError, match=r"squaring: worker-2 \(pid \d+ on [\d.]+\) did not answer within 2 s\. Raise pool\.knob"
    ):
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


class Killed(Worker):
    """Its first process is gone before it is up."""

    def __init__(self, index, graves):
        super().__init__(index, graves)
        if not (graves / "start").exists():
            (graves / "start").touch()
            os._exit(1)


def test_an_actor_that_is_killed_as_it_starts_is_replaced(ray_cluster, tmp_path):
    pool, events = make_pool(
        tmp_path, 1, make=lambda index: ray.remote(Killed).options(num_cpus=0.1).remote(index, tmp_path)
    )
    assert [event.kind for event in events] == [EventKind.LOST, EventKind.REPLACED]
    assert pool.restarts_left == 2
    assert work(pool, [3]) == squares([3])


def test_one_that_is_killed_to_save_its_node_is_replaced(ray_cluster, tmp_path, monkeypatch):
    pool, events = make_pool(tmp_path, 2)
    get, killed = ray.get, []

    def get_or_die(refs, **options):
        if not killed and not options:  # as results are taken
            killed.append(get(refs))
            raise ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory.")
        return get(refs, **options)

    monkeypatch.setattr(ray, "get", get_or_die)
    assert work(pool, [1, 2]) == squares([1, 2])
    assert [event.kind for event in events] == [EventKind.LOST, EventKind.REPLACED]
    assert "running low on memory" in events[0].text


def test_who_died_who_took_the_place_and_what_is_left_is_told(ray_cluster, tmp_path):
    pool, events = make_pool(tmp_path, 2)
    before = pool.slots[1].where
    assert work(pool, [1, -2]) == squares([1, 2])
    lost, replaced = events
    assert (lost.kind, replaced.kind) == (EventKind.LOST, EventKind.REPLACED)
    for event in events:
        assert (event.role, event.actor, event.node) == ("worker", "worker-1", before.node)
        assert event.failure == "infrastructure"
    assert f"worker-1 (pid {before.pid} on {before.node}) died: squaring" in lost.text
    assert f"worker-1 (pid {pool.slots[1].where.pid} on" in replaced.text
    assert "worker.restarts has 2 left" in replaced.text
    assert pool.slots[1].where.pid == ray.get(pool.actors[1].ready.remote()) != before.pid


class Waiting(Worker):
    """There is no room for it until somebody makes some."""

    def __init__(self, index, graves):
        while not (graves / "room").exists():
            time.sleep(0.05)
        super().__init__(index, graves)


def test_work_moves_on_where_nobody_can_be_started_and_comes_back_where_somebody_can(ray_cluster, tmp_path):
    kind = {"now": Worker}

    def make(index):
        return ray.remote(kind["now"]).options(num_cpus=0.1).remote(index, tmp_path)

    pool, events = make_pool(tmp_path, 3, make=make, start_deadline_s=10)
    kind["now"], pool._start_deadline_s = Waiting, 1
    numbers = [1, 3, 4, -2, 5, 6, 7, 8]
    assert work(pool, numbers) == squares(numbers)
    assert kinds(events) == ["lost", "moved"]
    assert events[1].actor == "worker-1"
    assert "work of worker-1 goes to whoever is idle" in events[1].text
    assert (len(pool.actors), pool.restarts_left) == (2, 2)
    numbers = list(range(20, 27))
    assert work(pool, numbers) == squares(numbers)
    assert pool.broadcast(lambda actor: actor.learn.remote("v1"), what="learn", deadline_s=30, knob="x") == ["v1"] * 2
    (tmp_path / "room").touch()
    assert ray.wait([pool.slots[1].candidate.ready.remote()], timeout=30)[0]
    pool._start_deadline_s = 30
    assert len(work(pool, numbers)) == 7
    assert kinds(events) == ["lost", "moved", "replaced"]
    assert (len(pool.actors), pool.restarts_left) == (3, 2)


def test_a_pool_of_which_nobody_is_left_gives_up(ray_cluster, tmp_path):
    kind = {"now": Worker}

    def make(index):
        return ray.remote(kind["now"]).options(num_cpus=0.1).remote(index, tmp_path)

    pool, _ = make_pool(tmp_path, 1, make=make)
    kind["now"], pool._start_deadline_s = Waiting, 1
    with pytest.raises(PoolError, match=r"workers could not be replaced, and nobody is left: .*start_deadline_s"):
        work(pool, [-1])


def test_what_kills_its_workers_three_times_is_set_aside_and_nothing_else(ray_cluster, tmp_path):
    """Its two items are in the work of both actors: whoever dies of them, the rest comes out as without them."""
    pool, events = make_pool(tmp_path, 2)
    numbers = [1, 2, 3, 4, 666, 666, 7, 8, 9, 10]
    keys = [f"p{index // 2}" for index in range(10)]
    found = work(pool, numbers, keys=keys, deadline_s=60)
    first, second = found[4:6]
    assert first == second
    assert isinstance(first, Poisoned)
    assert (first.key, first.deaths) == ("p2", 3)
    assert found[:4] + found[6:] == squares(numbers[:4] + numbers[6:])
    assert pool.restarts_left == 3
    assert kinds(events).count("lost") == 3
    (quarantined,) = [event for event in events if event.kind is EventKind.QUARANTINED]
    assert quarantined.failure == "data"
    assert "p2 is set aside" in quarantined.text
    assert len(pool.actors) == 2


def test_deaths_of_other_causes_set_nothing_aside(ray_cluster, tmp_path):
    """Twice the worker dies of something that is gone the next time; then each key is alone, and nobody dies."""
    pool, events = make_pool(tmp_path, 1)
    numbers = [1, -2, 3, -4, 5]
    assert work(pool, numbers, keys=list("abcde")) == squares(numbers)
    assert kinds(events) == ["lost", "replaced"] * 2
    assert pool.restarts_left == 1


def test_who_dies_under_two_threads_is_replaced_once(ray_cluster, tmp_path):
    """One has its work in hand and the other one a broadcast: both go on with the same new actor."""
    pool, events = make_pool(tmp_path, 2)
    with ThreadPoolExecutor(1) as beside:
        numbers = list(range(1, 9))
        answers = beside.submit(
            lambda: [
                pool.broadcast(lambda actor: actor.learn.remote("v1"), what="learn", deadline_s=60, knob="x")
                for _ in range(40)
            ]
        )
        found = [value for value, _ in work(pool, [*numbers, -20, -21, *numbers], deadline_s=60)]
        assert found == [number * number for number in [*numbers, -20, -21, *numbers]]
        assert answers.result(60) == [["v1", "v1"]] * 40
    lost = sum(kind == "lost" for kind in kinds(events))
    assert kinds(events) == ["lost", "replaced"] * lost
    assert pool.restarts_left == 3 - lost
    assert 1 <= lost <= 2


def test_one_that_nothing_can_bring_up_to_date_waits_while_others_work(ray_cluster, tmp_path):
    pool, events = make_pool(tmp_path, 2)
    there = {"is": False}

    def bring_up_to_date(actor):
        if not there["is"]:
            raise WeightsLostError("weights v3 are lost, and the learner has gone on from them")

    pool.on_start = bring_up_to_date
    numbers = [1, -2, 3, 4]
    assert work(pool, numbers) == squares(numbers)
    assert kinds(events) == ["lost", "moved"]
    assert "weights v3 are lost" in events[1].text
    there["is"] = True
    assert work(pool, numbers) == squares(numbers)
    assert kinds(events) == ["lost", "moved", "replaced"]


def test_where_nobody_is_left_but_those_that_nothing_brings_up_to_date_it_is_said(ray_cluster, tmp_path):
    pool, _ = make_pool(tmp_path, 1)

    def bring_up_to_date(actor):
        raise WeightsLostError("weights v3 are lost")

    pool.on_start = bring_up_to_date
    with pytest.raises(WeightsLostError, match="weights v3 are lost"):
        work(pool, [1, -2])


def test_idle_actors_are_asked_for_what_takes_much_longer_and_the_late_one_is_told(ray_cluster, tmp_path):
    pool, events = make_pool(tmp_path, 4)
    given_up = []
    speculation = Speculation(share=0.5, abandon=lambda actor, items: given_up.append((actor, items)))
    numbers = [77, 1, 2, 3, 5, 6, 7, 8]
    assert work(pool, numbers, deadline_s=50, speculation=speculation) == squares(numbers)
    assert kinds(events) == ["moved"]
    assert "worker-0" in events[0].text
    assert given_up == [(pool.slots[0].actor, [77, 1])]
