"""The policy that a loss is anchored to, and the distance from the initial one.

    initial    the model the run was given
    previous   the policy at the start of the iteration (the usual choice of iterative DPO)
    ema        ref <- decay * ref + (1 - decay) * policy, once at the start of each iteration

    none       for objectives that need no reference: it is never computed, and its log-probs are 0

The first three are one snapshot of parameters and differ in what the start of an iteration does to it. The model object
is the policy's own; `torch.func.functional_call` runs it on the snapshot.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import xxhash

from learners import ranks
from learners.memory import ERRORS
from orchestrator.batching import completion_keys, split

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from conf.schema import ReferenceConfig
    from learners.packed import PackedColumns
    from learners.policy import Policy
    from orchestrator.types import PreferenceBatch


class Reference:
    """The loss reference, as a snapshot of parameters beside the live policy.

    Args:
        policy: holding the initial weights.
        config: which reference.
    """

    def __init__(self, policy: Policy, config: ReferenceConfig) -> None:
        if config.kind not in ("initial", "previous", "ema", "none"):
            raise ValueError(f"reference.kind is {config.kind!r}; it must be previous, initial, ema or none")
        self._policy = policy
        self._config = config
        self.parameters = {} if config.kind == "none" else snapshot(policy)

    @torch.no_grad()
    def begin_iteration(self) -> None:
        """Move the snapshot to where the iteration's reference is; the live policy is the iteration's first."""
        for name, parameter in self._policy.parameters_by_name().items():
            match self._config.kind:
                case "previous":
                    self.parameters[name].copy_(parameter)
                case "ema":
                    self.parameters[name].lerp_(parameter, 1 - self._config.ema_decay)

    def logprobs(self, columns: PackedColumns) -> Tensor:
        """Log-prob [C] (fp32) of each completion token under the reference; 0 without one."""
        if self._config.kind == "none":
            return torch.zeros(int(columns.completion_lengths.sum()))
        return self._policy.logprobs_with(self.parameters, columns)


class ReferenceLogprobs:
    """The reference's log-probs of an iteration's completions: computed when one is first seen, the same ever after.

    Computed again in other micro-batches they would differ in their last bits, so checkpoints hold them.

    Args:
        reference: which stands still until `clear`.
    """

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self._known: dict[bytes, NDArray[np.float32]] = {}
        """By xxh3-128 of what `completion_keys` gives."""

    def clear(self) -> None:
        """Forgets all: the reference moves."""
        self._known.clear()

    def annotate(self, batch: PreferenceBatch, max_tokens: int) -> PreferenceBatch:
        """The batch with the reference's log-probs, computed in micro-batches of `max_tokens` where they are missing.

        Raises:
            RuntimeError, MemoryError: memory ran out, on this rank or another; nothing was remembered.
        """
        keys = [xxhash.xxh3_128_digest(key) for key in completion_keys(batch)]
        ranks.together(lambda: self._learn(batch, keys, max_tokens), ERRORS)
        return replace(batch, reference_logprobs=np.concatenate([self._known[key] for key in keys]))

    def _learn(self, batch: PreferenceBatch, keys: list[bytes], max_tokens: int) -> None:
        if all(key in self._known for key in keys):
            return
        logprobs = np.concatenate([self._reference.logprobs(part).cpu().numpy() for part in split(batch, max_tokens)])
        pieces = np.split(logprobs, np.cumsum(batch.completion_lengths)[:-1])
        for key, piece in zip(keys, pieces, strict=True):
            self._known.setdefault(key, piece)

    def tensors(self) -> dict[str, Tensor]:
        """What all ranks know, the same on each: keys [S, 16], lengths [S] and values [C]; empty if that is nothing."""
        known = {key: piece for part in reversed(ranks.gather(self._known)) for key, piece in part.items()}
        if not known:
            return {}
        keys = sorted(known)
        return {
            "keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, 16),
            "lengths": torch.tensor([len(known[key]) for key in keys]),
            "values": torch.from_numpy(np.concatenate([known[key] for key in keys])),
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Knows what `tensors` gave, and nothing else."""
        self.clear()
        if tensors:
            pieces = np.split(tensors["values"].numpy(), np.cumsum(tensors["lengths"].numpy())[:-1])
            keys = [row.tobytes() for row in tensors["keys"].numpy()]
            self._known = dict(zip(keys, pieces, strict=True))


def snapshot(policy: Policy) -> dict[str, Tensor]:
    """A copy of the policy's parameters as they are now."""
    return {name: parameter.detach().clone() for name, parameter in policy.parameters_by_name().items()}


def kl_estimate(policy_logprobs: Tensor, initial_logprobs: Tensor) -> Tensor:
    """KL(pi || pi_0) at each token of completions that pi sampled at temperature 1; their sum estimates a sequence's.

    With r = pi_0 / pi at the sampled token this is r - 1 - log r (Schulman 2020, "Approximating KL Divergence", k3):
    unbiased given the tokens before it, never negative, and of less variance than -log r.

    Args:
        policy_logprobs: [C] log pi of the sampled tokens.
        initial_logprobs: [C] log pi_0 of them.

    Returns:
        [C] nats.
    """
    log_ratio = initial_logprobs - policy_logprobs
    return torch.expm1(log_ratio) - log_ratio
