"""Trust region preference approximation: preferences between levels of a rule's verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

    from conf.schema import LossConfig
    from learners.losses.base import LossInput


def trpa(inputs: LossInput, config: LossConfig) -> Tensor:
    """-log sigmoid(a beta (mean h_w - mean h_l)), one value a pair, with a = `loss.anisotropy` if chosen is right.

    Su et al. 2025, "Trust Region Preference Approximation: A simple and stable reinforcement learning algorithm for LLM
    reasoning" (arXiv:2504.04524): pairs of different levels of a group (`pairing=all`), the best level being a score of
    1; a = 1 between lower levels. Means per token, as in the authors' code; its trust region is `loss.kl_weight`. A
    group on one level makes no pair here, where the released code still pulls on its completions.

    Returns:
        [P]
    """
    return -F.logsigmoid(_strength(inputs, config) * inputs.mean_margin)


def trpa_sum(inputs: LossInput, config: LossConfig) -> Tensor:
    """-log sigmoid(a beta (h_w - h_l)): the same on sums over tokens, as the paper's theory has it.

    Returns:
        [P]
    """
    return -F.logsigmoid(_strength(inputs, config) * inputs.margin)


def _strength(inputs: LossInput, config: LossConfig) -> Tensor:
    """[P] a beta."""
    return torch.where(inputs.score_chosen >= 1, config.anisotropy, 1.0) * inputs.beta
