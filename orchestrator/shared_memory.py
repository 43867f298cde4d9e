"""Large arrays that one process writes and others of its node read in place.

The memory has no name: it belongs to the descriptors that are open on it and is gone when its owner is, whatever killed
it. Others reach it through the owner's entry in /proc, for as long as the owner lives. Linux only.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import LostObjectError
from orchestrator.processes import started


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedArray:
    """Where another process of the node finds the bytes.

    Example: ``SharedArray(pid=4711, born="5f3e...:8812", descriptor=9, serial=1, num_bytes=404_750_336)``
    """

    pid: int
    born: str
    """See `orchestrator.processes.started`: numbers are given anew."""
    descriptor: int
    """Of the owner."""
    serial: int
    """Of the memory: the owner gives descriptors anew."""
    num_bytes: int

    @property
    def is_owned(self) -> bool:
        """Whether the owner lives, where this process can see it."""
        return started(self.pid) == self.born

    def open(self) -> NDArray[np.uint8]:
        """The bytes, read-only, as they are at each moment.

        Raises:
            LostObjectError: the owner is dead, or lives where this process cannot see it.
        """
        try:
            if not self.is_owned:
                raise ProcessLookupError(self.pid)
            with open(f"/proc/{self.pid}/fd/{self.descriptor}", "rb") as file:
                # All pages at once: each would otherwise interrupt whoever reads it first.
                flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
                mapped = mmap.mmap(file.fileno(), self.num_bytes, flags=flags, prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:
            raise LostObjectError(
                f"the shared memory of process {self.pid} cannot be read: {error or type(error).__name__}"
            ) from error
        return np.frombuffer(mapped, np.uint8)


class SharedViews:
    """Arrays of another process, mapped once each: its slots come again and again."""

    def __init__(self) -> None:
        self._owner: tuple[int, str] | None = None
        self._views: dict[int, tuple[int, NDArray[np.uint8]]] = {}
        """By descriptor: the memory's serial, and the memory."""

    def open(self, place: SharedArray) -> NDArray[np.uint8]:
        """See `SharedArray.open`. What a dead owner left is let go of when another one's is opened."""
        owner = (place.pid, place.born)
        if owner != self._owner:
            self._owner, self._views = owner, {}
        serial, known = self._views.get(place.descriptor, (0, None))
        if known is None or serial != place.serial or len(known) < place.num_bytes or not place.is_owned:
            known = place.open()
            self._views[place.descriptor] = place.serial, known
        return known[: place.num_bytes]


class SharedSlots:
    """Memory of this process for the newest of a series of arrays, and for the one before, which is read until then."""

    def __init__(self) -> None:
        self._slots: list[tuple[int, int, NDArray[np.uint8]] | None] = [None, None]
        """Serial, descriptor, memory."""
        self._next = 0
        self._made = 0

    def take(self, num_bytes: int) -> tuple[NDArray[np.uint8], SharedArray]:
        """An array to be written, and where others find it; its bytes are those of the one before the last."""
        known = self._slots[self._next]
        if known is None or len(known[2]) < num_bytes:
            self._drop(self._next)
            self._made += 1
            known = self._slots[self._next] = (self._made, *_allocate(num_bytes))
        self._next = 1 - self._next
        serial, descriptor, array = known
        born = started(os.getpid()) or ""
        place = SharedArray(pid=os.getpid(), born=born, descriptor=descriptor, serial=serial, num_bytes=num_bytes)
        return array[:num_bytes], place

    def leave(self) -> None:
        """What was given is written to no more, and lasts as long as anyone reads it."""
        for slot in range(len(self._slots)):
            self._drop(slot)

    def _drop(self, slot: int) -> None:
        known, self._slots[slot] = self._slots[slot], None
        if known is not None:
            os.close(known[1])


def _allocate(num_bytes: int) -> tuple[int, NDArray[np.uint8]]:
    descriptor = os.memfd_create("agon-weights")
    os.ftruncate(descriptor, num_bytes)
    return descriptor, np.frombuffer(mmap.mmap(descriptor, num_bytes), np.uint8)
