"""Self-play preference optimization: each log-ratio is regressed to how much its answer wins more than half."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    chosen = inputs.log_ratio_chosen - (inputs.score_chosen - 0.5) / config.beta
    rejected = inputs.log_ratio_rejected - (inputs.score_rejected - 0.5) / config.beta
    return (chosen.square() + rejected.square()) / 2
