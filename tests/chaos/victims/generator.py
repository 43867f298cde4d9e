"""Struck while it decodes and while it takes new weights."""

from __future__ import annotations

import asyncio
from typing import Any

import actors.generator
from tests.chaos.saboteur import register, strike

_MID_WAVE_S = 0.3
_NEVER_S = 600.0


class Generator(actors.generator.Generator):
    """See the module."""

    def __init__(self, name: str, *arguments: Any, **options: Any) -> None:
        register("generator", name)
        super().__init__(name, *arguments, **options)

    async def generate(self, requests: Any) -> Any:
        point = "evaluating" if requests[0].id.startswith("greedy") else "collecting"
        doomed = strike(point, own="generator", delay_s=_MID_WAVE_S)
        answers = await super().generate(requests)
        if doomed:
            await asyncio.sleep(_NEVER_S)  # it dies in the midst of a wave, however fast it is
        return answers

    async def update_weights(self, publication: Any, deadline_s: float) -> Any:
        if publication.version.number:
            strike("publication")
        return await super().update_weights(publication, deadline_s)
