"""Work that takes much longer than the rest is asked of idle workers as well, and what comes first counts.

A worker is late once it takes twice as long as most, and at least half of the shares are done. Each item is in work
with two at most, and what a dead one had is asked for again where nobody else has it. Only so many of a call's items
are copied. It makes who answers a matter of time; so nobody waits for the successor of a dead one to start, either.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from orchestrator.slots import Slot

Work = TypeVar("Work")

_LATE = 2.0
"""Times as long as the median of the others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Speculation(Generic[Work]):
    """Whether it is done."""

    share: float
    """Of the items of a call, that may be given out twice at most."""
    abandon: Callable[[Any, list[Work]], Any]
    """Has an actor give up items that were answered elsewhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Items that are given to a worker together."""

    positions: tuple[int, ...]
    alone: bool = False
    """Whether it is all items of one key, given to a worker that has nothing else."""
    is_copy: bool = False
    """Whether another worker has been asked for its items before."""


@dataclass(kw_only=True, slots=True, eq=False)
class Given:
    """A share in work."""

    slot: Slot
    actor: Any
    """Of the slot, at the time."""
    share: Share
    since: float
    """Seconds."""
    is_copied: bool = False
    """Whether others are asked for its items as well."""


class Stragglers:
    """Says what is late.

    Args:
        share: `Speculation.share`.
        num_items: of the call.
    """

    def __init__(self, share: float, num_items: int) -> None:
        self._left = int(share * num_items)
        self._taken_s: list[float] = []
        """How long shares took, in order of length."""

    def note(self, seconds: float) -> None:
        """A share is done."""
        insort(self._taken_s, seconds)

    def late(
        self, pending: Mapping[Any, Given], now: float, most: int, suspected: Callable[[Sequence[int]], bool]
    ) -> Sequence[Any]:
        """References of at most so many shares that are late and not copied yet; they count as copied now.

        What may have killed a worker is not given to a second one at the same time.
        """
        if self._left <= 0 or len(self._taken_s) <= len(pending):
            return []
        limit_s = _LATE * self._taken_s[len(self._taken_s) // 2]
        found: list[Any] = []
        for ref, given in pending.items():
            share = given.share
            if len(found) == most:
                break
            if now - given.since <= limit_s or given.is_copied or share.is_copy or share.alone:
                continue
            if len(share.positions) <= self._left and not suspected(share.positions):
                self._left -= len(share.positions)
                given.is_copied = True
                found.append(ref)
        return found
