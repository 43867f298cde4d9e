"""No silent stall: a wait that lasts too long is reported with whom it waits for, and what that one does meanwhile."""

from __future__ import annotations

import threading
import time
import traceback
from typing import TYPE_CHECKING

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from orchestrator.errors import FailureKind
from orchestrator.events import Event, EventKind
from orchestrator.waits import owners, underway

if TYPE_CHECKING:
    from types import TracebackType

    from orchestrator.events import Emit
    from orchestrator.waits import Peer, Wait

_ANSWER_S = 5.0
"""An actor that is well gives its stack within so long."""
_LINES = 12
"""Of each stack, the last ones."""


class Watchdog:
    """Looks at the waits of this process from a thread of its own, while the context is open.

    Args:
        emit: told of each wait that is older than `stall_s`, and again each time its age has doubled.
        stall_s: seconds (`cluster.stall_s`).
    """

    def __init__(self, emit: Emit, stall_s: float) -> None:
        self._emit = emit
        self._stall_s = stall_s
        self._tick_s = min(1.0, stall_s / 4)
        self._stop = threading.Event()
        self._due: dict[Wait, float] = {}
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(2 * _ANSWER_S)

    def _run(self) -> None:
        while not self._stop.wait(self._tick_s):
            waits = underway()
            self._due = {wait: self._due.get(wait, self._stall_s) for wait in waits}
            for wait in waits:
                age = time.monotonic() - wait.since
                if age >= self._due[wait]:
                    self._due[wait] = 2 * age
                    try:
                        self._report(wait, age)
                    except Exception:  # noqa: BLE001 - a watchdog that cannot say one thing goes on to the next
                        traceback.print_exc()

    def _report(self, wait: Wait, age: float) -> None:
        peers = owners(wait.refs)
        began = time.strftime("%H:%M:%S", time.localtime(time.time() - age))
        owed = " It is owed by " + "; ".join(self._describe(peers)) if peers else ""
        one = peers[0] if len(peers) == 1 else None
        self._emit(
            Event(
                kind=EventKind.STALLED,
                text=f"{wait.what}: waiting for {age:.0f} s, since {began}; its deadline is {wait.deadline_s:g} s"
                f" ({wait.knob}).{owed}",
                role=peers[0].role if peers else None,
                actor=", ".join(peer.name for peer in peers) or None,
                node=one.where.node if one and one.where else None,
                failure=FailureKind.INFRASTRUCTURE,
            )
        )

    def _describe(self, peers: list[Peer]) -> list[str]:
        """Each actor with what it does now; all are asked at once."""
        asked = {peer.name: peer.actor.stack.remote() for peer in peers if peer.where is not None}
        if asked:
            ray.wait(list(asked.values()), num_returns=len(asked), timeout=_ANSWER_S)
        return [f"{peer}, which {_answer(asked.get(peer.name))}" for peer in peers]


def _answer(ref: object) -> str:
    if ref is None:
        return "is starting, or waits for room on the cluster"
    try:
        stack: str = ray.get(ref, timeout=0)
    except GetTimeoutError:
        return (
            f"does not answer within {_ANSWER_S:g} s: its process is stopped, starved, or in code that lets nothing"
            " else through"
        )
    except RayActorError:
        return "is dead"
    except RayError as error:
        return f"cannot say what it does: {type(error).__name__}"
    return "is at\n" + "\n".join(stack.splitlines()[-_LINES:])
