"""`python -m tests.chaos.victim ...`: the `agon` command with a saboteur in each of its processes."""

from __future__ import annotations

from typing import Any

import torch

import actors.generator
import actors.scorer
import launch.placement
import learners.checkpoint
import learners.learner
import orchestrator.queues
from launch import cli
from orchestrator import batching
from tests.chaos.saboteur import register, strike

_MID_WAVE_S = 0.3


class Generator(actors.generator.Generator):
    """Struck while it decodes and while it takes new weights."""

    def __init__(self, name: str, *arguments: Any, **options: Any) -> None:
        register("generator", name)
        super().__init__(name, *arguments, **options)

    async def generate(self, requests: Any) -> Any:
        strike("evaluating" if requests[0].id.startswith("greedy") else "collecting", delay_s=_MID_WAVE_S)
        return await super().generate(requests)

    async def update_weights(self, publication: Any, deadline_s: float) -> Any:
        if publication.version.number:
            strike("publication")
        return await super().update_weights(publication, deadline_s)


class ScorerActor(actors.scorer.ScorerActor):
    """Struck while it scores."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        register("judge")
        super().__init__(*arguments, **options)

    def score(self, groups: Any) -> Any:
        strike("scoring")
        return super().score(groups)


class Learner(learners.learner.Learner):
    """Struck between gradient and step, and while a checkpoint is written."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        register("learner")
        super().__init__(*arguments, **options)
        take, seal = torch.optim.AdamW.step, learners.checkpoint._seal

        def step(optimizer: Any, *rest: Any) -> Any:
            strike("optimizer step")
            return take(optimizer, *rest)

        def half_written(*rest: Any) -> Any:
            strike("checkpoint")
            return seal(*rest)

        torch.optim.AdamW.step = step
        learners.checkpoint._seal = half_written


class QueueActor(orchestrator.queues.QueueActor):
    """Only known by its process."""

    def __init__(self, capacity: int) -> None:
        register("queue")
        super().__init__(capacity)


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


if __name__ == "__main__":
    main()
