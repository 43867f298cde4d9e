"""The protocol of a decoding engine: what a generator actor drives, one step at a time.

`vllm_engine.py` is the default; `transformers_engine.py` stands in where vLLM cannot be installed. Engines are plain
objects: no Ray, no threads. Whoever owns one calls it from one thread only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import torch
    from numpy.typing import NDArray

    from orchestrator.types import FinishReason, GenerationRequest
    from orchestrator.weights import TensorRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOutput:
    """A finished request: a `Completion` that does not know yet which weights made it."""

    request_id: str
    token_ids: tuple[int, ...]
    """New tokens, the terminating EOS included."""
    text: str
    """Decoded without special tokens."""
    logprobs: tuple[float, ...]
    """Log-prob of each token at temperature 1 without truncation."""
    finish_reason: FinishReason


class Engine(Protocol):
    """Decodes many requests together; new ones may join and old ones leave between two steps."""

    def add(self, request: GenerationRequest) -> None:
        """Queues a request. Raises ValueError for one that can never be served (too long, bad sampling)."""

    def step(self) -> list[EngineOutput]:
        """Advances every running request by at least one token; returns those that finished."""

    def abort(self, request_ids: Sequence[str]) -> None:
        """Drops requests; unknown ids are ignored. Dropped requests are never returned by `step`."""

    def lengths(self) -> Mapping[str, int]:
        """New tokens so far of each request that `step` goes on with."""

    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do."""

    def load_weights(self, tensors: Mapping[str, torch.Tensor], *, lasts: bool = False) -> None:
        """Replaces weights in place (Hugging Face checkpoint names) and drops every cache of the old ones.

        Running requests go on under the new weights; their cached keys and values are recomputed.

        Args:
            tensors: by name.
            lasts: nobody writes to their memory before the next weights are loaded: an engine may keep it instead of a
                copy.
        """

    def outdated(self, records: Sequence[TensorRecord]) -> list[str]:
        """Names of tensors that have another checksum than their record: the proof of `load_weights`.

        Those that `unreadable` lists are left out: `score` proves them.
        """

    def unreadable(self, records: Sequence[TensorRecord]) -> list[str]:
        """Those that `outdated` cannot compare: unknown to the model, sharded over devices, or of another dtype."""

    def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """Log-probs of ``sequence[1:]`` given their prefixes, each [len(sequence) - 1]. Every cache is bypassed."""

    def close(self) -> None:
        """Frees devices and child processes."""


def token_budget(request: GenerationRequest, *, max_length: int, vocab_size: int) -> int:
    """Most new tokens the request may have: `max_tokens`, or what the context window leaves it.

    Raises:
        ValueError: The request can never be served.
    """
    sampling, prompt = request.sampling, request.prompt_token_ids
    if not 0 < len(prompt) < max_length:
        raise ValueError(
            f"Request {request.id!r} has a prompt of {len(prompt)} tokens; a context of {max_length} takes 1 to "
            f"{max_length - 1}. Shorten the prompt or raise model.max_length."
        )
    if not 0 <= min(prompt) <= max(prompt) < vocab_size:
        raise ValueError(
            f"Request {request.id!r} has token ids from {min(prompt)} to {max(prompt)}; the model's vocabulary is "
            f"0 to {vocab_size - 1}. Tokenize the prompt with the model's own tokenizer."
        )
    if sampling.max_tokens < 1 or sampling.temperature < 0 or not 0 < sampling.top_p <= 1 or "" in sampling.stop:
        raise ValueError(
            f"Request {request.id!r} asks for {sampling}; max_tokens must be at least 1, temperature at least 0, "
            "top_p above 0 and at most 1, and no stop string empty."
        )
    return min(sampling.max_tokens, max_length - len(prompt))


def check_sequences(sequences: Sequence[Sequence[int]], *, max_length: int, vocab_size: int) -> None:
    """Checks what `Engine.score` is given.

    Raises:
        ValueError: A sequence is empty, longer than the context window or has tokens out of the vocabulary.
    """
    for index, sequence in enumerate(sequences):
        if not 0 < len(sequence) <= max_length:
            raise ValueError(f"Sequence {index} to score has {len(sequence)} tokens; give 1 to {max_length}.")
        if not 0 <= min(sequence) <= max(sequence) < vocab_size:
            raise ValueError(
                f"Sequence {index} to score has token ids from {min(sequence)} to {max(sequence)}; the model's "
                f"vocabulary is 0 to {vocab_size - 1}."
            )
