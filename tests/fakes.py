"""Stand-ins for control-flow tests only."""

import os

import numpy as np

from actors.engine import EngineOutput
from orchestrator.types import FinishReason


class CountingEngine:
    """Emits token 1 until `max_tokens`, one a step; holds weights as a dictionary."""

    def __init__(self, **options):
        self.options = options
        self.running = {}
        self.weights = {}
        self.batches = []
        self.closed = False
        self.fail_at_step = None
        self.ignores_updates = False
        self.hidden = ()

    def add(self, request):
        if not request.prompt_token_ids:
            raise ValueError(f"request {request.id} has an empty prompt")
        self.running[request.id] = (request, [])

    def step(self):
        if self.fail_at_step is not None and len(self.batches) >= self.fail_at_step:
            raise RuntimeError("out of memory")
        self.batches.append(sorted(self.running))
        for _, tokens in self.running.values():
            tokens.append(1)
        done = [rid for rid, (request, tokens) in self.running.items() if len(tokens) == request.sampling.max_tokens]
        return [self._finish(rid) for rid in done]

    def _finish(self, request_id):
        _, tokens = self.running.pop(request_id)
        return EngineOutput(
            request_id=request_id,
            token_ids=tuple(tokens),
            text="x" * len(tokens),
            logprobs=(0.0,) * len(tokens),
            finish_reason=FinishReason.LENGTH,
        )

    def abort(self, request_ids):
        for request_id in request_ids:
            self.running.pop(request_id, None)

    def lengths(self):
        return {rid: len(tokens) for rid, (_, tokens) in self.running.items()}

    def has_unfinished(self):
        return bool(self.running)

    def load_weights(self, tensors, *, lasts=False):
        if not self.ignores_updates:
            self.weights = {name: tensor.clone() for name, tensor in tensors.items()}

    def outdated(self, records):
        from actors.held_weights import Held, outdated_among

        shown = [record for record in records if record.name not in self.hidden]
        missing = [record.name for record in shown if record.name not in self.weights]
        return missing + outdated_among(
            shown, lambda name: Held(self.weights[name], self.weights[name]) if name in self.weights else None
        )

    def unreadable(self, records):
        return [record.name for record in records if record.name in self.hidden]

    def score(self, sequences):
        return [np.full(len(sequence) - 1, -1.0, dtype=np.float32) for sequence in sequences]

    def close(self):
        self.closed = True


POISON = 666
"""A token that no process survives."""


class DyingEngine(CountingEngine):
    """Kills its process at the first step that has `POISON` in a prompt, and where it is to score it."""

    def step(self):
        if any(POISON in request.prompt_token_ids for request, _ in self.running.values()):
            os._exit(1)
        return super().step()

    def score(self, sequences):
        if any(POISON in sequence for sequence in sequences):
            os._exit(1)
        return super().score(sequences)
