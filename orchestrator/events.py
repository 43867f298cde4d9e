"""What happened beside the plan: `<run>/events.jsonl`, one JSON object a line, and a line in the terminal.

    lost          an actor's process died                    replaced      another took its place
    moved         its work went to the others of its pool    stalled       a wait is longer than `cluster.stall_s`
    quarantined   a prompt kills whoever works on it         skipped       a batch left the weights as they were
    rolled_back   an iteration was given up                  alarm         a figure is not what it should be
    resumed       the run goes on where it stopped           damaged       a file is not what the ledger says
    adapted       a setting was changed to go on             stopped       the run ended before its plan

Keys: `time` (seconds since the epoch), `kind`, `text`, and where they are known `iteration`, `role`, `actor`, `node`,
`failure` (`orchestrator.errors.FailureKind`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TextIO

from orchestrator.files import cut_torn_line, dump_json, read_json_lines

if TYPE_CHECKING:
    from pathlib import Path

FILE_NAME = "events.jsonl"


class EventKind(StrEnum):
    """See the table above."""

    LOST = "lost"
    REPLACED = "replaced"
    MOVED = "moved"
    STALLED = "stalled"
    QUARANTINED = "quarantined"
    SKIPPED = "skipped"
    ROLLED_BACK = "rolled_back"
    ALARM = "alarm"
    RESUMED = "resumed"
    DAMAGED = "damaged"
    ADAPTED = "adapted"
    STOPPED = "stopped"


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One thing that happened.

    Example: ``Event(kind=EventKind.LOST, role="generator", actor="generator-1", text="generator-1 died: ...")``
    """

    kind: EventKind
    text: str
    """For people: what, where, and what is done about it."""
    iteration: int | None = None
    role: str | None = None
    actor: str | None = None
    node: str | None = None
    """Address of the machine."""
    failure: str | None = None
    """Whose fault it was (`FailureKind`)."""


Emit = Callable[[Event], None]


def ignore(_: Event) -> None:
    """For parts that nobody listens to."""


class EventLog:
    """Appends to `<run>/events.jsonl` and tells `show`; may be called from any thread.

    Args:
        run_dir: the run folder; it exists.
        show: takes the text of each event, for the terminal.
    """

    def __init__(self, run_dir: Path, show: Callable[[str], None]) -> None:
        self._show = show
        self._lock = threading.Lock()
        path = run_dir / FILE_NAME
        if path.exists():
            cut_torn_line(path)
        self._file: TextIO = path.open("a", encoding="utf-8")

    def __call__(self, event: Event) -> None:
        """Writes an event; it is in the file when this returns."""
        line = {"time": time.time(), **{key: value for key, value in asdict(event).items() if value is not None}}
        with self._lock:
            self._file.write(dump_json(line) + "\n")
            self._file.flush()
            self._show(event.text)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's events, oldest first; none where nothing happened."""
    return read_json_lines(run_dir / FILE_NAME)
