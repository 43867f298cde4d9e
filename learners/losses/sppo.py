"""Self-play preference optimization: each log-ratio is regressed to how much its answer wins more than half."""

from __future__ import annotations

from typing import TYPE_CHECKING

FARTHEST = 1000.0
"""gpo: targets lie within so many nats, as in the authors' settings."""

if TYPE_CHECKING:
    from torch import Tensor

    from conf.schema import LossConfig
    from learners.losses.base import LossInput


def sppo(inputs: LossInput, config: LossConfig) -> Tensor:
    """1/2 [(h_w - (P_w - 1/2) / beta)^2 + (h_l - (P_l - 1/2) / beta)^2], one value a pair.

    Wu et al. 2024, "Self-Play Preference Optimization for Language Model Alignment" (arXiv:2405.00675), the square loss
    of Algorithm 1 on two answers, as in the authors' code; beta = 1 / eta. P_w and P_l are the scores of the pair:
    the probabilities that the answer beats the data policy. The policy's log normalizer is taken to be eta / 2, which
    is where the 1/2 comes from.

    Returns:
        [P]
    """
    chosen = inputs.log_ratio_chosen - (inputs.score_chosen - 0.5) / inputs.beta
    rejected = inputs.log_ratio_rejected - (inputs.score_rejected - 0.5) / inputs.beta
    return (chosen.square() + rejected.square()) / 2


def sppo_hard(inputs: LossInput, config: LossConfig) -> Tensor:
    """(h_w - 1 / (2 beta))^2 + (h_l + 1 / (2 beta))^2: P_w = 1 and P_l = 0 whatever the scores, without the half.

    The form that libraries call `sppo_hard`; for pairs without win probabilities.

    Returns:
        [P]
    """
    target = 1 / (2 * inputs.beta)
    return (inputs.log_ratio_chosen - target).square() + (inputs.log_ratio_rejected + target).square()


def gpo(inputs: LossInput, config: LossConfig) -> Tensor:
    """1/2 [(h_w - s_w / beta)^2 + (h_l - s_l / beta)^2] with general preference scores s, one value a pair.

    Zhang et al. 2024, "Beyond Bradley-Terry Models: A General Preference Model for Language Model Alignment"
    (arXiv:2410.02197), the score form of its general preference optimization: s is a completion's mean logit of winning
    against the other samples, times `loss.score_scale`. Targets are cut off at `FARTHEST`.

    Returns:
        [P]
    """
    scale = config.score_scale / inputs.beta
    chosen = inputs.log_ratio_chosen - (scale * inputs.score_chosen).clamp(-FARTHEST, FARTHEST)
    rejected = inputs.log_ratio_rejected - (scale * inputs.score_rejected).clamp(-FARTHEST, FARTHEST)
    return (chosen.square() + rejected.square()) / 2
