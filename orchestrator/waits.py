"""What this process waits for right now, and which of its actors owe the answers.

    fetch, pool.map --waiting()--> [ register of waits ] <--underway()-- the watchdog
    pools, placement --introduce()--> [ register of actors ] <--owners()-- messages, the watchdog

A reference to an actor's answer names the actor by its id, so that whoever waits needs to know no more than that.

A thread that works beside the main one looks now and then whether anybody wants its work any more: Ray cannot be shut
down under a thread that waits for it.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from orchestrator.stacks import Where


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """An actor that this process has started.

    Example: ``Peer(role="generator", name="generator-1", actor=<handle>, where=Where(pid=4711, ...))``
    """

    role: str
    name: str
    actor: Any
    """Its Ray handle; an `orchestrator.stacks.Observable`."""
    where: Where | None
    """None: it is not up yet."""

    def __str__(self) -> str:
        return f"{self.name} ({self.where or 'not up yet'})"


@dataclass(kw_only=True, slots=True, eq=False)
class Wait:
    """One wait that is under way."""

    what: str
    """What is waited for, with the role that works on it."""
    knob: str
    """The configuration key that sets the deadline."""
    deadline_s: float
    refs: Collection[Any]
    """What is still owed; whoever waits puts in what is left as answers come."""
    since: float = field(default_factory=time.monotonic)
    """On the monotonic clock, seconds."""


class Unwanted(BaseException):
    """Raised in a thread whose work nobody wants any more. No `Exception`: nothing mends it."""


_lock = threading.Lock()
_mine = threading.local()
_waits: list[Wait] = []
_peers: dict[str, Peer] = {}


@contextmanager
def waiting(*, what: str, knob: str, deadline_s: float, refs: Collection[Any]) -> Iterator[Wait]:
    """Registers a wait for as long as the block runs."""
    wait = Wait(what=what, knob=knob, deadline_s=deadline_s, refs=refs)
    with _lock:
        _waits.append(wait)
    try:
        yield wait
    finally:
        with _lock:
            _waits.remove(wait)


def underway() -> list[Wait]:
    """All waits of this process, the oldest first."""
    with _lock:
        return list(_waits)


def work_until(*unwanted: threading.Event) -> None:
    """From now on waits of this thread end with `Unwanted` soon after one of the events is set."""
    _mine.unwanted = unwanted


def may_be_unwanted() -> bool:
    """Whether this thread was told to look."""
    return bool(getattr(_mine, "unwanted", ()))


def check_wanted() -> None:
    """Raises Unwanted where nobody wants what this thread does."""
    if may_be_unwanted() and any(event.is_set() for event in _mine.unwanted):
        raise Unwanted


def introduce(peer: Peer) -> None:
    """Remembers who an actor is; what was known of the same actor before is replaced."""
    with _lock:
        _peers[_id_of(peer.actor)] = peer


def forget(actor: Any) -> None:
    """Nobody waits for this actor any more."""
    with _lock:
        _peers.pop(_id_of(actor), None)


def forget_everybody() -> None:
    """None of the actors is there any more: their Ray was shut down."""
    with _lock:
        _peers.clear()


def acquainted() -> list[Peer]:
    """All actors that this process has started and not given up."""
    with _lock:
        return list(_peers.values())


def owners(refs: Collection[Any]) -> list[Peer]:
    """The known actors whose answers `refs` are, each once, by name."""
    ids = {ref.task_id().actor_id().hex() for ref in list(refs)}
    with _lock:
        return sorted((peer for key, peer in _peers.items() if key in ids), key=lambda peer: peer.name)


def _id_of(actor: Any) -> str:
    found: str = actor._actor_id.hex()
    return found
