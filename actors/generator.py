"""The generator: a Ray actor around an engine. It answers only under weights that were published and proved."""

from __future__ import annotations

import asyncio
import os
import traceback
from typing import TYPE_CHECKING, Any

from actors.engine_loop import EngineLoop
from actors.engines import build_engine
from actors.vllm_transfer import WeightReceiver
from orchestrator.errors import PublicationError
from orchestrator.remote import fetch
from orchestrator.shared_memory import SharedViews
from orchestrator.stacks import Observable
from orchestrator.startup import uncollected
from orchestrator.weights import Probe, Publication, install

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from actors.engine import Engine
    from orchestrator.types import Completion, GenerationRequest, PolicyVersion


class Generator(Observable):
    """One engine of the pool. Methods are coroutines, so publications and status calls pass running generation.

    Args:
        name: for messages.
        kind: of the engine.
        engine_options: see `build_engine`.
        fixed_version: of the weights in the engine's folder, where they are served as they are (a judge's); None: the
            generator answers once weights were published to it.
    """

    def __init__(
        self, name: str, kind: str, engine_options: dict[str, Any], fixed_version: PolicyVersion | None = None
    ) -> None:
        self.name = name
        with uncollected():
            engine = build_engine(kind, **engine_options)
        self._loop = EngineLoop(engine, on_failure=_die, spans=self.spans)
        self._loop.hold(fixed_version)
        self._views = SharedViews()
        self._first: Probe | None = None
        """Of the first weights that were proved: mostly those of its folder, which it had before."""
        self._tried = False
        """Whether its forward pass was seen to agree with the learner's where that of the first weights would not."""

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """Completes `requests`, in their order, as one wave."""
        return await asyncio.wrap_future(self._loop.submit(requests))

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """Log-probs of ``sequence[1:]`` given their prefixes under the published weights; see `Engine.score`.

        Raises:
            PublicationError: no weights were published, or the last publication failed.
        """

        def run(engine: Engine) -> list[NDArray[np.float32]]:
            if self._loop.version is None:
                raise PublicationError(f"{self.name} holds no published weights to score with")
            return engine.score(sequences)

        return await asyncio.wrap_future(self._loop.call(run, "score"))

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Gives requests up; they come back as aborted completions."""
        await asyncio.wrap_future(self._loop.abort(request_ids))

    async def update_weights(self, publication: Publication, deadline_s: float) -> PolicyVersion:
        """Loads and proves published weights between two decoding steps.

        Args:
            publication: of the learner.
            deadline_s: until its bytes must have come (`cluster.publish_deadline_s`).

        Raises:
            DeadlineError: they have not.
            PublicationError: naming this generator, the tensor and the version. The generator then serves nothing
                until a publication succeeds.
        """
        buckets = await asyncio.to_thread(self.receive, publication, deadline_s)

        def switch(engine: Engine) -> PolicyVersion:
            self._loop.pause()
            version = None
            try:
                version = install(engine, publication, buckets, holder=self.name, tried=self._tried)
                self._first = self._first or publication.probe
                self._tried = self._tried or publication.probe.tells_apart(self._first)
                return version
            finally:
                self._loop.hold(version)

        return await asyncio.wrap_future(self._loop.call(switch, "load weights"))

    async def transfer(self, method: str, payload: dict[str, Any]) -> None:
        """Runs `WeightReceiver.<method>` (`cluster.weight_transport` nccl or ipc); `update_weights` proves it after."""

        def run(engine: Any) -> None:
            self._loop.pause()
            getattr(WeightReceiver(engine), method)(payload)

        await asyncio.wrap_future(self._loop.call(run, "load weights"))

    def receive(self, publication: Publication, deadline_s: float) -> list[NDArray[np.uint8]]:
        """The publication's bytes, read in place from shared memory or the object store."""
        if publication.shared is not None:
            return [self._views.open(publication.shared)]
        buckets: list[NDArray[np.uint8]] = fetch(
            list(publication.buckets),
            what=f"{self.name}: bytes of weights {publication.version}",
            deadline_s=deadline_s,
            knob="cluster.publish_deadline_s",
        )
        return buckets

    async def generated(self) -> tuple[int, int]:
        """Completions finished since the actor started, and their tokens."""
        return self._loop.generated_completions, self._loop.generated_tokens

    async def version(self) -> PolicyVersion | None:
        """The weights that it answers with; None where it holds none that were proved."""
        return self._loop.version

    async def ready(self) -> int:
        """The process id, once the engine is built."""
        return os.getpid()


def _die(error: BaseException) -> None:
    """An actor whose engine is dead is of no use: its pool replaces a dead process, not a deaf one."""
    traceback.print_exception(error)
    os._exit(1)
