"""The dispatcher with many generators, under a simulated clock (`benchmarks/simulated.py`): nothing is timed here."""

from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.simulated import Generator, Speeds, World, simulated
from orchestrator import pace
from orchestrator.blame import Poisoned
from orchestrator.events import EventKind
from orchestrator.pools import ActorPool
from orchestrator.speculation import Speculation

EQUAL = Speeds(spread=0.0, tokens=250.0, token_s=0.02, start_s=30.0, life_s=1e12)
"""Each share takes 5 s."""


@pytest.fixture
def start():
    """Starts a world with so many generators."""
    entered = []

    def make(size, speeds=EQUAL, slow=None):
        world, events = World(speeds), []
        context = simulated(world)
        context.__enter__()
        entered.append(context)
        pool = ActorPool(
            role="generator",
            make=lambda index: Generator(world, index, **(slow or {}).get(index, {})),
            num_actors=size,
            restarts=size,
            start_deadline_s=600.0,
            emit=events.append,
        )
        pool.wait_ready()
        return world, pool, events

    yield make
    for context in entered:
        context.__exit__(None, None, None)


def ask(pool, work, **options):
    return pool.map(
        lambda actor, share: actor.generate.remote(share),
        work,
        what="work",
        deadline_s=10_000.0,
        knob="generator.deadline_s",
        keys=[str(item) for item in work],
        **options,
    )


@pytest.mark.parametrize("size", [30, 300, 1_500])
def test_an_answer_costs_a_bounded_number_of_looks_however_many_are_missed(start, size):
    world, pool, _ = start(size, Speeds(life_s=1e12))
    before = world.looks
    assert len(ask(pool, list(range(2 * size)))) == 2 * size
    assert (world.looks - before) / size < 150


def test_those_who_die_together_are_replaced_together(start):
    world, pool, events = start(20)
    for slot in pool.slots[:10]:
        world.after(1.0, slot.actor.end)
    began = world.now()
    assert len(ask(pool, list(range(40)))) == 40
    assert [event.kind for event in events].count(EventKind.LOST) == 10
    assert [event.kind for event in events].count(EventKind.REPLACED) == 10
    assert 36.0 <= world.now() - began < 60.0  # not ten starts of 30 s one after the other


def test_a_whole_life_of_deaths_loses_no_work(start):
    world, pool, events = start(50, Speeds(life_s=600.0, start_s=1.0))
    for wave in range(5):
        assert None not in ask(pool, list(range(wave, wave + 100)))
    assert EventKind.REPLACED in {event.kind for event in events}
    assert EventKind.QUARANTINED not in {event.kind for event in events}
    assert world.now() > 100.0


def speculation(share):
    return Speculation(share=share, abandon=lambda actor, items: actor.abort.remote(items))


@pytest.mark.parametrize(
    ("share", "slow", "seconds", "again"),
    [
        (0.0, [7], 100.0, 0),
        (0.1, [7], 15.0, 2),
        (0.1, [7, 8, 9], 100.0, 4),  # a tenth of 40 items: two of three slow shares of two
    ],
)
def test_idle_workers_are_asked_for_what_takes_long_within_the_bound(start, share, slow, seconds, again):
    """Shares of two items take 5 s; a slow worker takes 100 s."""
    world, pool, events = start(20, slow={index: {"slowness": 20.0} for index in slow})
    began = world.now()
    found = ask(pool, list(range(40)), speculation=speculation(share))
    assert len(found) == 40
    assert None not in found
    assert seconds <= world.now() - began < seconds + 5.0
    assert sum(actor.asked for actor in pool.actors) == 40 + again
    assert sum(actor.given_up for actor in pool.actors) == again  # of each that was asked twice, one is given up
    assert [event.kind for event in events] == [EventKind.MOVED] * (again // 2)


def test_a_copy_that_dies_is_not_asked_for_again(start):
    world, pool, _ = start(20, slow={7: {"slowness": 20.0}})
    for slot in pool.slots[:2]:
        world.after(12.0, slot.actor.end)  # they have the copies
    before = pool.actors
    assert None not in ask(pool, list(range(40)), speculation=speculation(0.1))
    assert [actor.asked for actor in before] == [3, 3] + [2] * 18
    assert [actor.asked for actor in pool.actors] == [2] * 18  # whoever comes in their place is not asked
    assert len(pool.vacant) == 2


def test_what_others_answered_is_not_asked_for_again_when_its_own_worker_dies(start):
    """The two others work on copies when it dies: its work waits, and has been done when they are idle."""
    world, pool, _ = start(3, slow={2: {"slowness": 20.0}})
    world.after(12.0, pool.slots[2].actor.end)
    began = world.now()
    assert None not in ask(pool, list(range(6)), speculation=speculation(0.5))
    assert world.now() - began < 18.0
    assert pool.slots[2].actor is None
    assert [actor.asked for actor in pool.actors] == [3, 3]


def test_what_a_worker_may_have_died_of_is_with_one_worker_at_a_time(start):
    """Those who take over what the dead one had are slow by then: they are late, and nobody helps them."""
    world, pool, _ = start(20)
    world.after(3.0, pool.slots[7].actor.end)
    for slot in pool.slots[:2]:
        world.after(4.0, partial(slot.actor.grow_slow, 20.0))
    began = world.now()
    assert None not in ask(pool, list(range(40)), speculation=speculation(0.5))
    assert world.now() - began > 100.0
    assert sum(actor.asked for actor in pool.actors) == 40


@pytest.mark.parametrize(("share", "seconds"), [(None, 36.0), (0.0, 11.0), (0.1, 11.0)])
def test_idle_workers_do_what_a_dead_one_had_where_time_decides_who_answers(start, share, seconds):
    """Shares take 5 s, a bit longer on the worker that dies after 6 s; its successor takes 30 s to start."""
    world, pool, events = start(20, slow={7: {"slowness": 1.5}})
    world.after(6.0, pool.slots[7].actor.end)
    began, options = world.now(), {} if share is None else {"speculation": speculation(share)}
    assert None not in ask(pool, list(range(40)), **options)
    assert seconds <= world.now() - began < seconds + 9.0
    assert sum(actor.asked for actor in pool.actors) == 40
    assert (EventKind.MOVED in {event.kind for event in events}) == (share is not None)
    world.after(40.0, lambda: None)
    world.run_until(lambda: world.now() > began + 40.0)
    ask(pool, list(range(40)), **options)
    assert [event.kind for event in events].count(EventKind.REPLACED) == 1
    assert len(pool.living) == 20


@pytest.mark.parametrize(("start_s", "asked"), [(30.0, [None, 4]), (1.0, [2, 2])])
def test_where_nobody_is_idle_a_dead_ones_work_is_done_by_whoever_can_first(start, start_s, asked):
    speeds = Speeds(spread=0.0, tokens=250.0, token_s=0.02, start_s=start_s, life_s=1e12)
    world, pool, _ = start(2, speeds)
    world.after(1.0, pool.slots[0].actor.end)
    began = world.now()
    assert None not in ask(pool, list(range(4)), speculation=speculation(0.1))
    assert world.now() - began < 12.0
    assert [slot.actor and slot.actor.asked for slot in pool.slots] == asked


def test_a_pool_of_one_waits_for_its_successor(start):
    world, pool, _ = start(1)
    assert ask(pool, []) == []
    world.after(1.0, pool.slots[0].actor.end)
    assert None not in ask(pool, list(range(4)), speculation=speculation(0.1))
    assert len(pool.living) == 1


def test_work_of_a_slot_that_another_thread_fills_is_given_out(start):
    """Which happens while that waits in vain for somebody who is idle; weights that are published do it."""
    world, pool, _ = start(2, Speeds(spread=0.0, tokens=250.0, token_s=0.02, start_s=3.0, life_s=1e12))
    world.after(1.0, pool.slots[0].actor.end)

    def publish():
        pool.broadcast(lambda actor: actor.ready.remote(), what="publication", deadline_s=60.0, knob="x")

    options = {"on_tick": publish, "tick_s": 0.1, "speculation": speculation(0.1)}
    assert None not in ask(pool, list(range(4)), **options)
    assert [slot.actor.asked for slot in pool.slots] == [2, 2]


def test_nothing_is_held_against_work_that_was_given_to_the_dead(start):
    """One dies with work, two that were idle die with it: nobody has noticed those when they are to take it over."""
    world, pool, events = start(8, slow={0: {"slowness": 3.0}})
    for slot in pool.slots[:3]:
        world.after(6.0, slot.actor.end)
    found = ask(pool, list(range(8)), speculation=speculation(0.0))
    assert not any(isinstance(one, Poisoned) for one in found)
    assert [event.kind for event in events].count(EventKind.LOST) == 3


def test_where_nobody_is_left_whoever_is_up_first_has_the_work(start):
    """0 dies and 1 has its share; 1 dies when the successor of 0 is up already. That of 1 never comes."""
    world, pool, _ = start(2, slow={1: {"slowness": 4.0}})
    world.after(1.0, pool.slots[0].actor.end)
    ends = pool.slots[1].actor.end
    world.after(35.0, lambda: (ends(), setattr(world, "speeds", replace(EQUAL, start_s=1e9))))
    began = world.now()
    assert None not in ask(pool, list(range(4)), speculation=speculation(0.0))
    assert world.now() - began < 60.0
    assert [slot.name for slot in pool.vacant] == ["generator-1"]


def test_one_that_dies_on_the_way_up_keeps_nobody_waiting(start):
    world, pool, events = start(20)
    world.after(1.0, pool.slots[0].actor.end)
    ask(pool, list(range(40)), speculation=speculation(0.0))
    pool.slots[0].candidate.end()
    began = world.now()
    assert None not in ask(pool, list(range(40)), speculation=speculation(0.0))
    assert world.now() - began < 15.0
    assert [event.kind for event in events].count(EventKind.LOST) == 2


class Mortal(Generator):
    """Dies of some items, and notes what it was asked."""

    def __init__(self, world, index, poison, asked):
        super().__init__(world, index)
        generate = self.generate.remote

        def note(items):
            asked.update(items)
            ref = generate(items)
            if poison in items:
                world.after(0.001, lambda: self.end() if ref in self._owed else None)
            return ref

        self.generate = SimpleNamespace(remote=note)


@given(seed=st.integers(0, 10**9))
@settings(max_examples=60)
def test_whoever_dies_each_item_is_answered_once_and_only_poison_is_set_aside(seed):
    random = np.random.default_rng(seed)
    size, num_items, deaths = random.integers(1, 20), random.integers(1, 60), random.integers(0, 20)
    poison = random.integers(num_items) if random.random() < 0.5 else None
    start_s, share = random.choice([0.1, 3.0, 30.0, 100.0]), random.choice([None, 0.0, 0.1, 1.0])
    world, asked, events = World(Speeds(start_s=start_s, life_s=1e12), seed), Counter(), []
    with simulated(world):
        pool = ActorPool(
            role="generator",
            make=lambda index: Mortal(world, index, poison, asked),
            num_actors=size,
            restarts=1_000,
            start_deadline_s=600.0,
            emit=events.append,
        )
        pool.wait_ready()
        if poison is None:  # who is killed beside it, or again and again, may be mistaken for its victim
            at = random.uniform(0.0, 20.0)
            for slot in random.choice(pool.slots, min(size, deaths), replace=False):
                world.after(at, slot.actor.end)
        options = {} if share is None else {"speculation": speculation(share)}
        if random.random() < 0.5:
            options |= {"on_tick": lambda: pool.fill_vacant(60.0, glance_s=0.0), "tick_s": 0.1}
        found = ask(pool, list(range(num_items)), **options)
    assert len(found) == num_items
    assert None not in found
    assert [index for index, one in enumerate(found) if isinstance(one, Poisoned)] == (
        [] if poison is None else [poison]
    )
    lost = [event.kind for event in events].count(EventKind.LOST)
    assert max(asked.values()) <= 2 + lost
    if poison is not None:
        assert lost == 3


def test_what_takes_long_is_done_seldom(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: now[0]))
    paced = pace.Pace(interval_s=2.0)
    assert paced.left_s == 2.0
    now[0] += 3.0
    assert paced.left_s == 0.0
    with paced.work():
        now[0] += 0.01
    assert paced.left_s == pytest.approx(2.0)
    with paced.work():
        now[0] += 1.0
    assert paced.left_s == pytest.approx(59.0)
