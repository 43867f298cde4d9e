"""Memory that others of the node read in place, and that leaves nothing behind."""

import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest

from orchestrator.errors import LostObjectError
from orchestrator.shared_memory import SharedArray, SharedSlots, SharedViews

OWNER = textwrap.dedent("""
    import sys
    from orchestrator.shared_memory import SharedSlots

    array, place = SharedSlots().take(1 << 20)
    array[:] = 7
    print(place.pid, place.born, place.descriptor, place.num_bytes, flush=True)
    sys.stdin.read()
""")


def written_by_another():
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=os.getcwd()
    )
    pid, born, descriptor, size = owner.stdout.readline().split()
    place = SharedArray(pid=int(pid), born=born, descriptor=int(descriptor), serial=1, num_bytes=int(size))
    return owner, place


def test_another_process_reads_in_place_until_the_owner_is_killed():
    owner, place = written_by_another()
    found = place.open()
    assert found.nbytes == 1 << 20
    assert (found == 7).all()
    assert not found.flags.writeable
    with pytest.raises(LostObjectError, match=f"process {owner.pid} cannot be read"):
        replace(place, born=f"{place.born}1").open()  # its number was given anew
    owner.send_signal(signal.SIGKILL)
    owner.wait(10)
    assert (found == 7).all(), "what is open stays"
    with pytest.raises(LostObjectError, match=f"process {owner.pid} cannot be read"):
        place.open()


def test_slots_keep_the_one_before_and_are_used_again():
    slots = SharedSlots()
    first, place = slots.take(100)
    first[:] = 1
    reader = place.open()
    second, _ = slots.take(100)
    second[:] = 2
    assert (reader == 1).all(), "the one before may still be read"
    third, again = slots.take(50)
    third[:] = 3
    assert (again.descriptor, again.num_bytes) == (place.descriptor, 50)
    assert (reader[:50] == 3).all()
    descriptors = len(os.listdir("/proc/self/fd"))
    for size in (200, 200, 300, 300, 100):
        array, place = slots.take(size)
        array[:] = size % 251
        assert np.array_equal(place.open(), array)
    del first, second, third, reader, array
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_what_is_left_is_written_to_no_more():
    """A publication that is repeated may find readers of the one before, who go on computing with it."""
    slots, views = SharedSlots(), SharedViews()
    held = []
    for number in (1, 2):
        array, place = slots.take(100)
        array[:] = number
        held.append(views.open(place))
    slots.leave()
    for number in (3, 4, 5):
        array, place = slots.take(100)
        array[:] = number
        assert (views.open(place) == number).all(), "also where the descriptor is one that was seen before"
    assert [set(memory.tolist()) for memory in held] == [{1}, {2}]


def test_views_follow_slots_that_grow_and_map_each_once():
    slots, views = SharedSlots(), SharedViews()
    mapped = {}
    for number, size in enumerate((100, 100, 50, 100, 5000, 5000, 80, 70_000), start=1):
        array, place = slots.take(size)
        array[:] = number
        found = views.open(place)
        assert found.nbytes == size
        assert (found == number).all()
        if (known := mapped.get(place.descriptor)) is not None and size <= len(known):
            assert np.shares_memory(found, known), "mapped once"
        else:
            mapped[place.descriptor] = found


def test_views_of_a_dead_owner_are_not_given_again():
    owner, place = written_by_another()
    views = SharedViews()
    assert (views.open(place) == 7).all()
    owner.send_signal(signal.SIGKILL)
    owner.wait(10)
    with pytest.raises(LostObjectError, match=f"process {owner.pid} cannot be read"):
        views.open(place)
    array, own = SharedSlots().take(10)
    array[:] = 3
    assert (views.open(own) == 3).all()
