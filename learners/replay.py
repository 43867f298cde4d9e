"""Seed data that every optimizer step goes over again, so that a skill which no pair rewards is not forgotten.

Self-rewarding models are taught to judge before they judge themselves; an update that only sees preference pairs would
wear that skill away (Yuan et al. 2024, "Self-Rewarding Language Models", section 2.1: evaluation fine-tuning data).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from orchestrator.batching import pack_sequences

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from learners.policy import Policy
    from orchestrator.types import SeedSequence


class Replay:
    """Draws seed sequences, the same ones for the same optimizer step.

    Args:
        sequences: the seed data.
        per_step: sequences of one optimizer step.
        weight: of their loss beside the preference loss.
        seed: of the draws.
    """

    def __init__(self, sequences: Sequence[SeedSequence], *, per_step: int, weight: float, seed: int) -> None:
        self._sequences = sequences
        self._per_step = min(per_step, len(sequences))
        self._weight = weight
        self._seed = seed

    def backward(self, policy: Policy, step: int) -> float:
        """Adds the gradient of `weight` times the mean loss of the step's draw; returns that mean, nats a token."""
        random = np.random.default_rng([self._seed, step])
        drawn = random.choice(len(self._sequences), self._per_step, replace=False)
        loss = seed_nll(policy, [self._sequences[index] for index in drawn.tolist()])
        (self._weight * loss).backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())


def seed_nll(policy: Policy, sequences: Sequence[SeedSequence]) -> Tensor:
    """Mean negative log-likelihood of the learned tokens of all `sequences` together, nats a token; differentiable."""
    columns, index = pack_sequences([(sequence.prompt, sequence.completion) for sequence in sequences])
    logprobs = policy(columns)
    ends = np.cumsum(columns.completion_lengths)
    weights = np.zeros(len(logprobs), np.float32)
    for sequence, number in zip(sequences, index.tolist(), strict=True):
        weights[ends[number] - columns.completion_lengths[number] : ends[number]] += sequence.learned
    learned = torch.from_numpy(weights).to(logprobs.device)
    loss: Tensor = -(logprobs * learned).sum() / learned.sum()
    return loss
