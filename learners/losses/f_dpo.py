"""DPO under other divergences than the reverse KL."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

    from conf.schema import LossConfig
    from learners.losses.base import LossInput

_LARGEST_EXPONENT = 80.0


def f_dpo(inputs: LossInput, config: LossConfig) -> Tensor:
    """-log sigmoid(beta (g(h_w) - g(h_l))), one value a pair, with g the derivative of f at exp(h).

        forward_kl  g = -exp(-h)
        js          g = log sigmoid(h)
        alpha       g = exp((a - 1) h) / (a - 1), a = `loss.divergence_alpha`, in (0, 1)

    Wang et al. 2023, "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence
    Constraints" (arXiv:2309.16240), equation 12 and table 1; `loss.divergence` chooses. Reverse KL is `dpo`. Constants
    that cancel in the difference are left out, and exponents are cut at 80.

    Returns:
        [P]
    """
    chosen, rejected = (_slope(ratio, config) for ratio in (inputs.log_ratio_chosen, inputs.log_ratio_rejected))
    return -F.logsigmoid(inputs.beta * (chosen - rejected))


def _slope(log_ratio: Tensor, config: LossConfig) -> Tensor:
    match config.divergence:
        case "forward_kl":
            return -torch.exp((-log_ratio).clamp(max=_LARGEST_EXPONENT))
        case "js":
            return F.logsigmoid(log_ratio)
        case _:
            power = config.divergence_alpha - 1
            return torch.exp((power * log_ratio).clamp(max=_LARGEST_EXPONENT)) / power
