"""Whose turn it is: with the generators, or with the judge."""

from __future__ import annotations

from collections import deque
from contextlib import contextmanager
from threading import Condition, get_ident
from typing import TYPE_CHECKING

from orchestrator.waits import check_wanted

if TYPE_CHECKING:
    from collections.abc import Iterator

_TICK_S = 0.5


class Floor:
    """One thread has it at a time, in the order in which they asked; it may take it again while it has it.

    What a thread does with it has deadlines of its own, and so has the wait of the next one.
    """

    def __init__(self) -> None:
        self._changed = Condition()
        self._line: deque[int] = deque()
        """Idents of threads; the first one has it."""

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Has it for as long as the block runs."""
        me = get_ident()
        with self._changed:
            has_it = bool(self._line) and self._line[0] == me
        if has_it:
            yield
            return
        with self._changed:
            self._line.append(me)
        try:
            self._await_turn(me)
            yield
        finally:
            with self._changed:
                self._line.remove(me)
                self._changed.notify_all()

    def _await_turn(self, me: int) -> None:
        with self._changed:
            while self._line[0] != me:
                self._changed.wait(_TICK_S)
                check_wanted()
