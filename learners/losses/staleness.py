"""Pairs that older weights sampled: how often the learner's own would have."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from learners.losses.base import LossInput


def importance(inputs: LossInput, sampled: Tensor, stale: Tensor, clip: float) -> Tensor:
    """[P] rho_w rho_l, without gradient, with rho = pi(y) / mu(y) within [1 / c, c]; 1 for pairs that are not stale.

    mu is what sampled each token, pi the learner's policy now. The expectation of a loss over two draws from pi is that
    over two draws from mu with these weights; where a pair is chosen among more draws than two, how likely the others
    make that choice is left out. Their variance grows with the length of a completion, so that they are clipped, as
    rho-bar does in Espeholt et al. 2018, "IMPALA" (arXiv:1802.01561), section 4.1; here on both sides, lest completions
    that have become a little rarer at each of many tokens count for nothing.

    Args:
        inputs: with log pi.
        sampled: [P, 2] log mu of chosen and rejected.
        stale: [P] whether a pair was sampled by other weights than the learner began the iteration with.
        clip: c, at least 1.
    """
    now = inputs.logprob.detach()
    log_ratios = torch.stack([now[inputs.chosen], now[inputs.rejected]], dim=1) - sampled
    weights = log_ratios.clamp(-math.log(clip), math.log(clip)).sum(dim=1).exp()
    return torch.where(stale, weights, torch.ones_like(weights))
