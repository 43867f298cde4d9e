"""Kahneman-Tversky optimization, on the two sides of each pair."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from conf.schema import LossConfig
    from learners.losses.base import LossInput


def kto(inputs: LossInput, config: LossConfig) -> Tensor:
    """Half the sum of w_D (1 - sigmoid(beta (h_w - z))) and w_U (1 - sigmoid(beta (z - h_l))), one value a pair.

    Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization" (arXiv:2402.01306), equation 8.
    z = max(0, mean h) over completions that answer another prompt of the batch. The half makes the mean over pairs the
    mean over completions.

    Reduces over the global batch: z. With completions of a single prompt there is nothing to mismatch, and z = 0.

    Returns:
        [P]
    """
    baseline = kl_baseline(inputs)
    chosen = 1 - torch.sigmoid(inputs.beta * (inputs.log_ratio_chosen - baseline))
    rejected = 1 - torch.sigmoid(inputs.beta * (baseline - inputs.log_ratio_rejected))
    return (config.desirable_weight * chosen + config.undesirable_weight * rejected) / 2


def kl_baseline(inputs: LossInput) -> Tensor:
    """[] z, without gradient."""
    if not len(inputs.mismatched):
        return inputs.logprobs.new_zeros(())
    return inputs.log_ratio.detach()[inputs.mismatched].mean().clamp(min=0)
