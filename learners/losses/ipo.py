"""Identity preference optimization."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from conf.schema import LossConfig
    from learners.losses.base import LossInput


def ipo(inputs: LossInput, config: LossConfig) -> Tensor:
    """(mean h_w - mean h_l - 1 / (2 beta))^2, one value a pair.

    Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human Preferences" (arXiv:2310.12036),
    equation 17, beta = tau, on means per token, as the authors say they trained.

    Returns:
        [P]
    """
    return (inputs.mean_margin - 1 / (2 * inputs.beta)).square()


def ipo_sum(inputs: LossInput, config: LossConfig) -> Tensor:
    """(Delta - 1 / (2 beta))^2: the equation as printed, on sums over tokens.

    Returns:
        [P]
    """
    return (inputs.margin - 1 / (2 * inputs.beta)).square()
