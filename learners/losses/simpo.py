"""Objectives on the policy's own likelihoods: no reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

    from conf.schema import LossConfig
    from learners.losses.base import LossInput


def simpo(inputs: LossInput, config: LossConfig) -> Tensor:
    """-log sigmoid(beta (m_w - m_l) - gamma) with m the mean log-prob per token, one value a pair.

    Meng et al. 2024, "SimPO" (arXiv:2405.14734), equation 6. With an SFT term it is TPO-L (`loss=tpo_l`).

    Returns:
        [P]
    """
    return -F.logsigmoid(inputs.beta * (inputs.mean_chosen - inputs.mean_rejected) - config.gamma)


def cpo(inputs: LossInput, config: LossConfig) -> Tensor:
    """-log sigmoid(beta (log pi(chosen) - log pi(rejected))), one value a pair.

    The preference term of Xu et al. 2024, "Contrastive Preference Optimization" (arXiv:2401.08417), equation 5, and of
    Saeidi et al. 2024, "Triple Preference Optimization" (arXiv:2405.16681); their SFT terms are `loss.sft_weight`, on
    the chosen completion for CPO and on the best one for TPO (`loss.sft_target`).

    Returns:
        [P]
    """
    return -F.logsigmoid(inputs.beta * (inputs.logprob_chosen - inputs.logprob_rejected))


def orpo(inputs: LossInput, config: LossConfig) -> Tensor:
    """-beta log sigmoid(log odds(chosen) - log odds(rejected)), odds = p / (1 - p), p = exp(mean log-prob per token).

    The odds-ratio term of Hong et al. 2024, "ORPO" (arXiv:2403.07691), equation 7, lambda = beta; its SFT term is
    `loss.sft_weight` on the chosen completion (the released code takes the likelihood of the prompt as well).

    Returns:
        [P]
    """
    chosen, rejected = inputs.mean_chosen, inputs.mean_rejected
    log_odds = (chosen - log1mexp(chosen)) - (rejected - log1mexp(rejected))
    return -inputs.beta * F.logsigmoid(log_odds)


def asft(inputs: LossInput, config: LossConfig) -> Tensor:
    """-log p_w - log(1 - p_l) with p = exp(mean log-prob per token), one value a pair.

    The alignment term of Wang et al. 2024, "ASFT: Aligned Supervised Fine-Tuning through Absolute Likelihood"
    (arXiv:2409.10571).

    Returns:
        [P]
    """
    return -inputs.mean_chosen - log1mexp(inputs.mean_rejected)


def log1mexp(logprob: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, exact near 0 and far from it (Maechler 2012); finite at 0, where it is -inf."""
    below = logprob.clamp(max=-torch.finfo(logprob.dtype).eps)
    near = below > -0.6931471805599453
    # Where one branch is not taken, its argument is moved so that its gradient stays finite.
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, below, -0.5))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, below))),
    )
