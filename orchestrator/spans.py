"""What an actor did when: it notes spans of work, and the controller keeps them in `<run>/profile.jsonl`."""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_PAUSE_S = 0.02
"""Work of one kind that goes on after so short a pause is one span."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A stretch of one kind of work.

    Example: ``Span(what="decode", start=1790000000.25, seconds=1.75)``
    """

    what: str
    start: float
    """Seconds since the epoch."""
    seconds: float


class Spans:
    """Notes spans, from any thread.

    Args:
        limit: spans that are kept until somebody takes them; the oldest ones go first.
    """

    def __init__(self, limit: int = 10_000) -> None:
        self._spans: deque[Span] = deque(maxlen=limit)
        self._lock = threading.Lock()

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Notes that this kind of work was done for as long as the block ran."""
        start, clock = time.time(), time.monotonic()
        try:
            yield
        finally:
            self._note(Span(what=what, start=start, seconds=time.monotonic() - clock))

    def take(self) -> list[Span]:
        """What was noted since it was taken last, in the order in which it ended."""
        with self._lock:
            taken = list(self._spans)
            self._spans.clear()
        return taken

    def _note(self, span: Span) -> None:
        with self._lock:
            last = self._spans[-1] if self._spans else None
            if last and last.what == span.what and 0 <= span.start - last.start - last.seconds < _PAUSE_S:
                self._spans[-1] = replace(last, seconds=span.start + span.seconds - last.start)
            else:
                self._spans.append(span)
