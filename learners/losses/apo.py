"""Anchored preference optimization: each side has a direction of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from conf.schema import LossConfig
    from learners.losses.base import LossInput


def apo_zero(inputs: LossInput, config: LossConfig) -> Tensor:
    """(1 - sigmoid(beta h_w)) + sigmoid(beta h_l): chosen up, rejected down, one value a pair.

    D'Oosterlinck et al. 2024, "Anchored Preference Optimization" (arXiv:2408.06266), equation 4: for chosen completions
    that are better than the policy's own.

    Returns:
        [P]
    """
    return (
        1
        - torch.sigmoid(inputs.beta * inputs.log_ratio_chosen)
        + torch.sigmoid(inputs.beta * inputs.log_ratio_rejected)
    )


def apo_down(inputs: LossInput, config: LossConfig) -> Tensor:
    """sigmoid(beta h_w) + 1 - sigmoid(beta Delta): both down, rejected more so, one value a pair.

    The same paper, equation 5: for a policy that is better than the chosen completions.

    Returns:
        [P]
    """
    return torch.sigmoid(inputs.beta * inputs.log_ratio_chosen) + 1 - torch.sigmoid(inputs.beta * inputs.margin)
