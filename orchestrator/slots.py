"""The places of a pool: who works there now, and what is told of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.errors import FailureKind
from orchestrator.events import Event, EventKind

if TYPE_CHECKING:
    from orchestrator.stacks import Where


@dataclass(kw_only=True, slots=True, eq=False)
class Slot:
    """One place of a pool."""

    role: str
    index: int
    actor: Any = None
    """Handle of the actor that works here; None while the slot is vacant."""
    where: Where | None = None
    """Of the latest actor; None until it is up."""
    candidate: Any = None
    """The actor that will work here once it is up, while the slot is vacant."""
    is_up: Any = None
    """Reference that is there once it is."""
    vacated_at: float = 0.0
    """Seconds; when it became vacant the last time."""
    lost: Any = None
    """The latest actor of the slot that was reported to be dead."""

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.role}-{self.index}"

    def __str__(self) -> str:
        return f"{self.name} ({self.where or 'not up yet'})"


def told(slot: Slot, kind: EventKind, text: str, failure: FailureKind = FailureKind.INFRASTRUCTURE) -> Event:
    """What happened to the actor of a slot."""
    node = slot.where.node if slot.where else None
    return Event(kind=kind, text=text, role=slot.role, actor=slot.name, node=node, failure=failure)
