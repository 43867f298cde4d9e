"""Objectives that regress log-ratios to differences of scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from conf.schema import LossConfig
    from learners.losses.base import LossInput


def rebel(inputs: LossInput, config: LossConfig) -> Tensor:
    """(Delta - eta (r_w - r_l))^2, one value a pair; eta is `loss.score_scale`.

    Gao et al. 2024, "REBEL: Reinforcement Learning via Regressing Relative Rewards" (arXiv:2404.16767), equation 9 as
    in the authors' code; the paper's (Delta / eta - dr)^2 has the same minimum.

    Returns:
        [P]
    """
    return (inputs.margin - config.score_scale * inputs.score_margin).square()


def irepo(inputs: LossInput, config: LossConfig) -> Tensor:
    """(beta Delta - logit(p))^2, one value a pair, with p the label, kept `loss.floor` away from 0 and 1.

    Le et al. 2024, "iREPO: implicit Reward Pairwise Difference based Empirical Preference Optimization"
    (arXiv:2405.15230). The scale is the one whose minimum is the optimum under a KL constraint.

    Returns:
        [P]
    """
    label = inputs.labels.clamp(config.floor, 1 - config.floor)
    return (inputs.beta * inputs.margin - torch.logit(label)).square()


def copg(inputs: LossInput, config: LossConfig) -> Tensor:
    """1 / (K - 1) sum over i > j of (R_i - R_j)^2 with R = c r - beta h, one value a group.

    Flet-Berliac et al. 2024, "Contrastive Policy Gradient: Aligning LLMs on sequence-level scores in a supervised-
    friendly fashion" (arXiv:2406.19185), equation 8 over all pairs of a prompt's K completions; c is
    `loss.score_scale`. Its optimum does not depend on who sampled.

    Returns:
        [G]
    """
    rewards = inputs.by_group(config.score_scale * inputs.scores - config.beta * inputs.log_ratio, torch.nan)
    differences = rewards[:, :, None] - rewards[:, None, :]
    real = ~differences.isnan()
    squares = torch.where(real, differences, 0.0).square().sum((1, 2)) / 2
    sizes = (~rewards.isnan()).sum(1)
    return squares / (sizes - 1).clamp(min=1)
