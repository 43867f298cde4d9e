"""For processes that begin by loading large libraries, and for one that lives for days."""

from __future__ import annotations

import ctypes
import gc
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_M_ARENA_MAX = -8  # of glibc's malloc.h


@contextmanager
def uncollected() -> Iterator[None]:
    """Modules make millions of objects that live on; looking for garbage among them costs a fifth of the time.

    Nor is it looked for among them later, which would hold up all threads of the process for some 300 ms now and then.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def share_one_heap() -> None:
    """All threads that start from now on, and Arrow, allocate from one heap.

    glibc gives threads heaps of their own and Arrow has another. Each grows for hours towards the most that it ever
    held: together, in a process with the dozens of threads that Ray starts, that looks like a leak.
    """
    import pyarrow  # where records are written it is loaded; actors without records need not

    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    with suppress(OSError, AttributeError):  # another C library, which knows no such setting
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def give_back_memory() -> None:
    """Memory that was freed between what is still held goes back to the system; takes some 10 ms for 100 MiB."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
