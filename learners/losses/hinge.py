"""Hinges."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from conf.schema import LossConfig
    from learners.losses.base import LossInput


def hinge(inputs: LossInput, config: LossConfig) -> Tensor:
    """max(0, 1 - beta Delta), one value a pair.

    Liu et al. 2023, "Statistical Rejection Sampling Improves Preference Optimization" (arXiv:2309.06657), equation 10.

    Returns:
        [P]
    """
    return (1 - inputs.beta * inputs.margin).clamp(min=0)


def slic(inputs: LossInput, config: LossConfig) -> Tensor:
    """max(0, gamma - log pi(chosen) + log pi(rejected)), one value a pair; without a reference.

    The calibration term of Zhao et al. 2023, "SLiC-HF" (arXiv:2305.10425), equation 1; its regularizer is
    `loss.sft_weight`.

    Returns:
        [P]
    """
    return (config.gamma - inputs.logprob_chosen + inputs.logprob_rejected).clamp(min=0)
