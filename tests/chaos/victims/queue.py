"""Only known by its process."""

from __future__ import annotations

import orchestrator.queues
from tests.chaos.saboteur import register


class QueueActor(orchestrator.queues.QueueActor):
    """See the module."""

    def __init__(self, capacity: int) -> None:
        register("queue")
        super().__init__(capacity)
