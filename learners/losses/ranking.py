"""Objectives on a whole ranking of a prompt's completions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

    from conf.schema import LossConfig
    from learners.losses.base import LossInput


def pro(inputs: LossInput, config: LossConfig) -> Tensor:
    """sum_k [logsumexp(T_k s_k, {T_kj s_j} for all j below k) - T_k s_k], one value a group; without a reference.

    Song et al. 2023, "Preference Ranking Optimization for Human Alignment" (arXiv:2306.17492), equation 7 with its
    reward differences as temperatures: s is the mean log-prob per token, T_kj = c (r_k - r_j) with c =
    `loss.score_scale`, and T_k = max_j T_kj. Below k are completions of a lower score. The released code shifts its
    mask with the logits and so loses a token; here the mask goes with the labels. Its SFT
    term is `loss.sft_weight` times the *mean* over the best completion's tokens; the authors' is the *sum* over them
    times 0.05 (K - 1)^2.

    Returns:
        [G]
    """
    means, scores = _ranked(inputs)
    gaps = config.score_scale * (scores[:, :, None] - scores[:, None, :])  # [G, K, K]
    below = gaps > 0
    gaps = torch.where(below, gaps, 0.0)
    own = gaps.amax(2) * torch.nan_to_num(means)
    others = (gaps * torch.nan_to_num(means)[:, None, :]).masked_fill(~below, -torch.inf)
    contrast = torch.logsumexp(torch.cat([own[:, :, None], others], 2), 2) - own
    return torch.where(below.any(2), contrast, 0.0).sum(1)


def aft(inputs: LossInput, config: LossConfig) -> Tensor:
    """log(1 + sum over r_p > r_n of [exp(s_n - s_p) + exp(T - s_n)]), one value a group; without a reference.

    Wang et al. 2023, "Making Large Language Models Better Reasoners with Alignment" (arXiv:2309.02144), the boundary
    form of its constrained alignment loss: s is the mean log-prob per token, and a worse completion is pushed down only
    while it is above the boundary T = 2 min s_p - beta, without gradient.

    Returns:
        [G]
    """
    means, scores = _ranked(inputs)
    better = scores[:, :, None] > scores[:, None, :]  # [G, p, n]
    s = torch.nan_to_num(means)
    least = torch.where(better, s[:, :, None], torch.inf).amin(1)  # [G, n] the lowest s_p above n
    boundary = (2 * torch.where(least.isinf(), 0.0, least) - config.beta).detach()
    contrast = (s[:, None, :] - s[:, :, None]).masked_fill(~better, -torch.inf)
    constraint = (boundary - s)[:, None, :].expand_as(contrast).masked_fill(~better, -torch.inf)
    terms = torch.cat([contrast.flatten(1), constraint.flatten(1), torch.zeros_like(s[:, :1])], 1)
    return torch.logsumexp(terms, 1)


def d2o(inputs: LossInput, config: LossConfig) -> Tensor:
    """-log sigmoid(beta / K sum_i h_i - alpha h_l) over a group's K completions above its worst, one value a group.

    Duan et al. 2024, "Negating Negatives: Alignment with Human Negative Samples via Distributional Dispreference
    Optimization" (arXiv:2403.03419), equation 3; alpha is `loss.negative_weight`. There y_l is a human's bad answer
    and all samples stand against it; here it is the sample of the lowest score.

    Returns:
        [G]
    """
    ratios, scores = inputs.by_group(inputs.log_ratio, torch.nan), inputs.by_group(inputs.scores, torch.inf)
    real = ~ratios.isnan()
    worst = F.one_hot(scores.argmin(1), scores.shape[1]).bool()
    above = real & ~worst
    ratios = torch.nan_to_num(ratios)
    mean = torch.where(above, ratios, 0.0).sum(1) / above.sum(1).clamp(min=1)
    return -F.logsigmoid(config.beta * mean - config.negative_weight * torch.where(worst, ratios, 0.0).sum(1))


def _ranked(inputs: LossInput) -> tuple[Tensor, Tensor]:
    """[G, K] mean log-probs per token, and scores; nan where a group has fewer completions."""
    means = inputs.logprob / inputs.lengths
    return inputs.by_group(means, torch.nan), inputs.by_group(inputs.scores, torch.nan)
