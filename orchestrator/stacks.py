"""What an actor says of itself from outside its work: where it runs, and what each of its threads does now."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path

import ray

from orchestrator.spans import Span, Spans

_PROJECT = str(Path(__file__).parent.parent) + os.sep
_FRAMES = 20
"""Innermost frames of one thread that are shown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Where:
    """Where an actor's process runs.

    Example: ``Where(pid=4711, node="10.0.0.7", node_id="e84420e7...")``
    """

    pid: int
    node: str
    """Address of the machine."""
    node_id: str
    """Ray's name of it, hex digits."""

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.node}"


class Observable:
    """An actor that can be asked while it works: it runs with room for one more call than it works on."""

    def where(self) -> Where:
        """Where its process runs."""
        return Where(
            pid=os.getpid(), node=ray.util.get_node_ip_address(), node_id=ray.get_runtime_context().get_node_id()
        )

    def stack(self) -> str:
        """See `stacks`."""
        return stacks()

    @property
    def spans(self) -> Spans:
        """What it notes of its work."""
        noted: Spans = self.__dict__.setdefault("_spans", Spans())
        return noted

    def take_spans(self) -> list[Span]:
        """What it did since this was asked last."""
        return self.spans.take()


def stacks() -> str:
    """The stacks of all threads of this process but the one that asks; threads that run this project's code last.

    Within a thread the innermost frame comes last, as in a traceback.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    foreign: list[str] = []
    own: list[str] = []
    for ident, frame in sys._current_frames().items():
        if ident == threading.get_ident():
            continue
        frames = traceback.extract_stack(frame, limit=_FRAMES)
        text = f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_list(frames))}"
        (own if any(_is_own(summary.filename) for summary in frames) else foreign).append(text)
    return "".join(foreign + own)


def _is_own(filename: str) -> bool:
    return filename.startswith(_PROJECT) and "site-packages" not in filename
