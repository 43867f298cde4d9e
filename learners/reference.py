"""The policy that a loss is anchored to, and the distance from the initial one.

    initial    the model the run was given
    previous   the policy at the start of the iteration (the usual choice of iterative DPO)
    ema        ref <- decay * ref + (1 - decay) * policy, once at the start of each iteration

    none       for objectives that need no reference: it is never computed, and its log-probs are 0

The first three are one snapshot of parameters and differ in what the start of an iteration does to it. The model object
is the policy's own; `torch.func.functional_call` runs it on the snapshot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from conf.schema import ReferenceConfig
    from learners.packed import PackedColumns
    from learners.policy import Policy


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
