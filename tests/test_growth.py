"""The dispatcher with many generators, under a simulated clock (`benchmarks/simulated.py`): nothing is timed here."""

from types import SimpleNamespace

import pytest

from benchmarks.simulated import Generator, Speeds, World, simulated
from orchestrator import pace
from orchestrator.events import EventKind
from orchestrator.pools import ActorPool

EQUAL = Speeds(spread=0.0, tokens=250.0, token_s=0.02, start_s=30.0, life_s=1e12)
"""Each share takes 5 s."""


@pytest.fixture
def start():
    """Starts a world with so many generators."""
    entered = []

    def make(size, speeds=EQUAL):
        world, events = World(speeds), []
        context = simulated(world)
        context.__enter__()
        entered.append(context)
        pool = ActorPool(
            role="generator",
            make=lambda index: Generator(world, index),
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


def ask(pool, work):
    return pool.map(
        lambda actor, share: actor.generate.remote(share),
        work,
        what="work",
        deadline_s=10_000.0,
        knob="generator.deadline_s",
        keys=[str(item) for item in work],
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
