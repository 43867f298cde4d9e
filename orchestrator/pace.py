"""How often to do what costs more the more there is to look at."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_REST = 59.0
"""Times as long as something took it is left alone afterwards."""


class Pace:
    """Spaces one kind of work.

    Args:
        interval_s: seconds before the first and between the end of one and the beginning of the next, at least.
    """

    def __init__(self, interval_s: float = 0.0) -> None:
        self._interval_s = interval_s
        self._due = time.monotonic() + interval_s

    @property
    def left_s(self) -> float:
        """Seconds until it is due; 0 where it is."""
        return max(0.0, self._due - time.monotonic())

    @contextmanager
    def work(self) -> Iterator[None]:
        """Does it: how long the block takes says how long it is left alone afterwards."""
        start = time.monotonic()
        try:
            yield
        finally:
            end = time.monotonic()
            self._due = end + max(self._interval_s, _REST * (end - start))
