"""Efficient exact optimization: reverse KL between the policy's and the rewards' distribution over a few answers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

    from conf.schema import LossConfig
    from learners.losses.base import LossInput


def exo_pair(inputs: LossInput, config: LossConfig) -> Tensor:
    """KL(q || (1 - eps, eps)) with q = softmax(beta h_w, beta h_l), one value a pair.

    Ji et al. 2024, "Towards Efficient Exact Optimization of Language Model Alignment" (arXiv:2402.00856), equation 16;
    eps is `loss.floor` and must be above 0. The released code leaves its target unnormalized.

    Returns:
        [P]
    """
    logits = inputs.beta * inputs.margin
    log_chosen, log_rejected = F.logsigmoid(logits), F.logsigmoid(-logits)
    target_chosen, target_rejected = math.log1p(-config.floor), math.log(config.floor)
    return log_chosen.exp() * (log_chosen - target_chosen) + log_rejected.exp() * (log_rejected - target_rejected)


def exo(inputs: LossInput, config: LossConfig) -> Tensor:
    """KL(softmax(beta h) || softmax(c r)) over the completions of a prompt, one value a group.

    The same paper, equation 11; c = 1 / beta_r is `loss.score_scale`.

    Returns:
        [G]
    """
    scores = inputs.by_group(config.score_scale * inputs.scores, -torch.inf)
    real = ~torch.isinf(scores)
    rewards = (inputs.by_group(inputs.log_ratio, 0.0) * config.beta).masked_fill(~real, -torch.inf)
    log_policy = rewards.log_softmax(1).masked_fill(~real, 0.0)
    log_target = scores.log_softmax(1).masked_fill(~real, 0.0)
    return torch.where(real, log_policy.exp() * (log_policy - log_target), 0.0).sum(1)
