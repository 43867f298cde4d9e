"""Noise contrastive alignment."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

    from conf.schema import LossConfig
    from learners.losses.base import LossInput


def nca_pair(inputs: LossInput, config: LossConfig) -> Tensor:
    """-log sigmoid(beta h_w) - 1/2 log sigmoid(-beta h_w) - 1/2 log sigmoid(-beta h_l), one value a pair.

    Chen et al. 2024, "Noise Contrastive Alignment of Language Models with Explicit Rewards" (arXiv:2402.05369),
    equation 14.

    Returns:
        [P]
    """
    chosen, rejected = inputs.beta * inputs.log_ratio_chosen, inputs.beta * inputs.log_ratio_rejected
    return -F.logsigmoid(chosen) - (F.logsigmoid(-chosen) + F.logsigmoid(-rejected)) / 2


def nca(inputs: LossInput, config: LossConfig) -> Tensor:
    """-sum_i softmax(c r)_i log sigmoid(beta h_i) - 1/K sum_i log sigmoid(-beta h_i), one value a group.

    The same paper, equation 12, over the K completions of a prompt; c = 1 / alpha is `loss.score_scale`. The released
    code adds 0.01 to the first completion's reward against ties; here nothing is added.

    Returns:
        [G]
    """
    rewards = inputs.by_group(inputs.log_ratio, 0.0) * config.beta
    real = ~torch.isinf(target := _scores(inputs, config))
    shares = target.softmax(1)
    noise = torch.where(real, F.logsigmoid(-rewards), 0.0).sum(1) / real.sum(1)
    return -(shares * F.logsigmoid(rewards)).sum(1) - noise


def infonca(inputs: LossInput, config: LossConfig) -> Tensor:
    """Cross entropy of softmax(beta h) to softmax(c r) over the completions of a prompt, one value a group.

    The same paper, equation 9; c = 1 / alpha is `loss.score_scale`.

    Returns:
        [G]
    """
    real = ~torch.isinf(target := _scores(inputs, config))
    rewards = inputs.by_group(inputs.log_ratio, 0.0) * config.beta
    log_policy = rewards.masked_fill(~real, -torch.inf).log_softmax(1)
    return -(target.softmax(1) * log_policy.masked_fill(~real, 0.0)).sum(1)


def _scores(inputs: LossInput, config: LossConfig) -> Tensor:
    """[G, K] scaled scores; -inf where a group has fewer completions."""
    return inputs.by_group(config.score_scale * inputs.scores, -torch.inf)
