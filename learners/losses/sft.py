"""The supervised term that RPO adds to a preference loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from learners.losses.base import LossInput


def chosen_nll(inputs: LossInput) -> Tensor:
    """-log pi(chosen) / length(chosen): mean negative log-likelihood of the chosen completion's tokens.

    Added with weight eta to DPO it is RPO (Liu et al. 2024, "Provably Mitigating Overoptimization in RLHF: Your SFT
    Loss is Implicitly an Adversarial Regularizer", eq. 4.4 with the token mean of the authors' code). It holds the
    likelihood of chosen completions up, which DPO alone lets fall.

    Returns:
        [P] nats a token.
    """
    return -inputs.logprob_chosen / inputs.length_chosen
