"""A thread that drives an engine for many callers at once: continuous batching across requests of all of them.

    submit(requests) ---> [inbox] --+
    call(function)  ---> [inbox] --+--> between two steps: take the inbox --> engine.step() --> resolve futures

Requests of one `submit` join the batch together, so a caller that submits a whole wave gets the same batches, and
bit for bit the same log-probs, each time. Functions given to `call` run between two steps, alone with the engine:
that is how weights change in flight.
"""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from actors.engine import EngineOutput
from orchestrator.errors import ActorLostError, PublicationError
from orchestrator.spans import Spans
from orchestrator.types import Completion, FinishReason, GenerationRequest, PolicyVersion

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from actors.engine import Engine

Result = TypeVar("Result")


@dataclass(kw_only=True, slots=True, eq=False)
class _Wave:
    """Requests that were submitted together, and what came back so far."""

    requests: tuple[GenerationRequest, ...]
    future: Future[list[Completion]]
    done: dict[str, Completion] = field(default_factory=dict)


class EngineLoop:
    """Owns an engine; every method may be called from any thread.

    Args:
        engine: driven by this loop alone from now on.
        on_failure: called when the engine dies, after every caller has been told.
        spans: where it notes when it decodes and when it does what it was called for.
    """

    def __init__(
        self,
        engine: Engine,
        on_failure: Callable[[BaseException], None] | None = None,
        spans: Spans | None = None,
    ) -> None:
        self._engine = engine
        self._spans = spans or Spans()
        self._on_failure = on_failure
        self._inbox: queue.SimpleQueue[_Wave | Callable[[], None] | None] = queue.SimpleQueue()
        self._wave_of: dict[str, _Wave] = {}
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)
        self._version: PolicyVersion | None = None
        self._paused_at: dict[str, int] | None = None
        """Tokens of each request in flight when a pause began; None: there is none."""
        self._waiting: list[_Wave] = []
        """That came during a pause."""
        self._held: dict[str, list[tuple[int, PolicyVersion]]] = {}
        """Of each request in flight: from which of its tokens on which weights sampled it."""
        self.generated_completions = 0
        """Since the start."""
        self.generated_tokens = 0
        """Of those completions."""
        self._thread.start()

    @property
    def version(self) -> PolicyVersion | None:
        """The weights that are loaded; None before the first publication, and where the last one failed."""
        return self._version

    def hold(self, version: PolicyVersion | None) -> None:
        """These weights sample from the pause on, also what is in flight; from now on where there was none.

        Called by what `call` runs. What had ended before the pause, and is only not delivered yet, is none of theirs.
        """
        lengths = self._engine.lengths() if self._paused_at is None else self._paused_at
        self._version, self._paused_at = version, None
        if version is not None:
            for request_id in self._held.keys() & lengths.keys():
                held = self._held[request_id]
                if held[-1][1] != version:
                    held.append((lengths[request_id], version))
        waiting, self._waiting = self._waiting, []
        for wave in waiting:
            self._admit(wave)

    def pause(self) -> None:
        """Nothing is sampled until `hold` says by what, but by what scores sequences. Called by what `call` runs."""
        if self._paused_at is None:
            self._paused_at = dict(self._engine.lengths())

    def submit(self, requests: Sequence[GenerationRequest]) -> Future[list[Completion]]:
        """Decodes `requests` together; the completions come in their order."""
        future: Future[list[Completion]] = Future()
        self._post(_Wave(requests=tuple(requests), future=future), future)
        return future

    def call(self, function: Callable[[Engine], Result], what: str = "other") -> Future[Result]:
        """Runs `function(engine)` between two steps; `what` it does is noted."""
        future: Future[Result] = Future()

        def job() -> None:
            with self._spans.during(what):
                _settle(future, lambda: function(self._engine))

        self._post(job, future)
        return future

    def abort(self, request_ids: Sequence[str]) -> Future[None]:
        """Gives requests up: their completions come back at once, empty and marked as aborted."""

        def drop(engine: Engine) -> None:
            engine.abort(request_ids)
            for request_id in self._wave_of.keys() & set(request_ids):
                self._deliver(
                    EngineOutput(
                        request_id=request_id, token_ids=(), text="", logprobs=(), finish_reason=FinishReason.ABORTED
                    )
                )

        return self.call(drop)

    def stop(self, timeout_s: float = 10.0) -> None:
        """Ends the thread and closes the engine; requests in flight fail."""
        self._inbox.put(None)
        self._thread.join(timeout_s)

    def _post(self, item: _Wave | Callable[[], None], future: Future[Result]) -> None:
        if self._failure is not None:
            future.set_exception(self._failure)
        else:
            self._inbox.put(item)

    def _run(self) -> None:
        try:
            while self._take_inbox():
                if self._has_work():
                    with self._spans.during("decode"):
                        for output in self._engine.step():
                            self._deliver(output)
            self._fail(RuntimeError("the engine was stopped"))
        except BaseException as error:  # noqa: BLE001 - an engine that dies must fail its callers, whatever killed it
            self._fail(ActorLostError(f"its engine died: {type(error).__name__}: {error}"))
            if self._on_failure is not None:
                self._on_failure(error)
        finally:
            self._engine.close()

    def _has_work(self) -> bool:
        return self._engine.has_unfinished() and self._paused_at is None

    def _take_inbox(self) -> bool:
        """Takes what waits; blocks only when the engine is idle. False when asked to stop."""
        while True:
            try:
                item = self._inbox.get(block=not self._has_work())
            except queue.Empty:
                return True
            if item is None:
                return False
            if not isinstance(item, _Wave):
                item()
            elif self._paused_at is not None:
                self._waiting.append(item)
            else:
                self._admit(item)

    def _admit(self, wave: _Wave) -> None:
        if not wave.requests:
            wave.future.set_result([])
            return
        if self._version is None:
            self._refuse(wave)
            return
        added: list[str] = []
        try:
            for request in wave.requests:
                if request.id in self._wave_of:
                    raise ValueError(f"request {request.id} is already in flight")
                self._engine.add(request)
                added.append(request.id)
                self._wave_of[request.id] = wave
                self._held[request.id] = [(0, self._version)]
        except ValueError as error:
            self._engine.abort(added)
            for request_id in added:
                del self._wave_of[request_id], self._held[request_id]
            wave.future.set_exception(error)

    def _deliver(self, output: EngineOutput) -> None:
        wave, held = self._wave_of.pop(output.request_id), self._held.pop(output.request_id)
        if self._version is None:
            self._refuse(wave)
            return
        policy, *switches = _that_sampled(held, len(output.token_ids))
        wave.done[output.request_id] = Completion(
            token_ids=output.token_ids,
            text=output.text,
            logprobs=output.logprobs,
            finish_reason=output.finish_reason,
            policy=policy[1],
            switches=tuple(switches),
        )
        self.generated_completions += 1
        self.generated_tokens += len(output.token_ids)
        if len(wave.done) == len(wave.requests) and not wave.future.done():
            wave.future.set_result([wave.done[request.id] for request in wave.requests])

    def _refuse(self, wave: _Wave) -> None:
        if not wave.future.done():
            wave.future.set_exception(PublicationError("the engine holds no published weights to answer with"))

    def _fail(self, error: BaseException) -> None:
        self._failure = error
        for wave in {id(wave): wave for wave in (*self._wave_of.values(), *self._waiting)}.values():
            if not wave.future.done():
                wave.future.set_exception(error)
        self._wave_of.clear()
        self._held.clear()
        while not self._inbox.empty():
            item = self._inbox.get()
            if isinstance(item, _Wave):
                item.future.set_exception(error)
            elif item is not None:
                item()


def _that_sampled(held: Sequence[tuple[int, PolicyVersion]], length: int) -> list[tuple[int, PolicyVersion]]:
    """Without the weights under which no token was sampled; the last ones where there is no token at all."""
    ends = [min(start, length) for start, _ in held[1:]] + [length]
    return [one for one, end in zip(held, ends, strict=True) if one[0] < end] or [(0, held[-1][1])]


def _settle(future: Future[Result], function: Callable[[], Result]) -> None:
    try:
        future.set_result(function())
    except BaseException as error:  # noqa: BLE001 - the caller waits on the future and gets whatever happened
        future.set_exception(error)
