"""Pairwise proximal policy optimization."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from conf.schema import LossConfig
    from learners.losses.base import LossInput


def p3o(inputs: LossInput, config: LossConfig) -> Tensor:
    """-A min(Delta, log(1 + c)) with A = (r_w - r_l) / 2, one value a pair: both log-ratios are clipped together.

    Wu et al. 2023, "Pairwise Proximal Policy Optimization: Harnessing Relative Feedback for LLM Alignment"
    (arXiv:2310.00212), the joint form: the gradient of the pairwise policy gradient (its equation 8) until the ratio of
    the two has moved by c = `loss.clip`. Ratios are to the reference, which must be the data policy.

    Returns:
        [P]
    """
    return -_advantage(inputs, config) * inputs.margin.clamp(max=math.log1p(config.clip))


def p3o_separate(inputs: LossInput, config: LossConfig) -> Tensor:
    """-A [min(h_w, log(1 + c)) - max(h_l, log(1 - c))]: each log-ratio is clipped by itself, one value a pair.

    The same paper, the separate form.

    Returns:
        [P]
    """
    chosen = inputs.log_ratio_chosen.clamp(max=math.log1p(config.clip))
    rejected = inputs.log_ratio_rejected.clamp(min=math.log1p(-config.clip))
    return -_advantage(inputs, config) * (chosen - rejected)


def _advantage(inputs: LossInput, config: LossConfig) -> Tensor:
    return config.score_scale * inputs.score_margin / 2
