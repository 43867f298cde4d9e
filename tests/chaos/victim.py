"""The `agon` command with a saboteur in each of its processes."""

from __future__ import annotations

from typing import Any

import launch.placement
import orchestrator.queues
from launch import cli
from orchestrator import batching
from tests.chaos.saboteur import register, strike
from tests.chaos.victims.generator import Generator
from tests.chaos.victims.learner import Learner
from tests.chaos.victims.queue import QueueActor
from tests.chaos.victims.scorer import ScorerActor


def main() -> None:
    """Runs the command with all of it in place."""
    register("controller")
    pack = batching.pack

    def packing(*rest: Any, **options: Any) -> Any:
        strike("packing")
        return pack(*rest, **options)

    batching.pack = packing
    launch.placement.Generator = Generator
    launch.placement.ScorerActor = ScorerActor
    launch.placement.Learner = Learner
    orchestrator.queues.QueueActor = QueueActor
    cli.main()
