"""Direct preference optimization."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

    from conf.schema import LossConfig
    from learners.losses.base import LossInput


def dpo(inputs: LossInput, config: LossConfig) -> Tensor:
    """-log sigmoid(beta Delta), one value a pair.

    Rafailov et al. 2023, "Direct Preference Optimization" (arXiv:2305.18290), equation 7. Delta is a sum over tokens.
    SPIN (Chen et al. 2024, arXiv:2401.01335, equation 4.7) is this with a human answer as chosen.

    Returns:
        [P]
    """
    return -F.logsigmoid(inputs.beta * inputs.margin)


def ln_dpo(inputs: LossInput, config: LossConfig) -> Tensor:
    """-log sigmoid(beta (mean h_w - mean h_l)): DPO on means per token, whose beta is of the order of 1 to 5.

    Length-normalized DPO of Lambert et al. 2024, "Tulu 3" (arXiv:2411.15124), equation 6.

    Returns:
        [P]
    """
    return -F.logsigmoid(inputs.beta * inputs.mean_margin)


def dpop(inputs: LossInput, config: LossConfig) -> Tensor:
    """-log sigmoid(beta (Delta - lambda max(0, -h_w))): DPO that does not let the chosen completion become rarer.

    Pal et al. 2024, "Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive" (arXiv:2402.13228),
    equation 3; lambda is `loss.penalty`.

    Returns:
        [P]
    """
    fallen = (-inputs.log_ratio_chosen).clamp(min=0)
    return -F.logsigmoid(inputs.beta * (inputs.margin - config.penalty * fallen))
