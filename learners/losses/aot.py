"""Alignment via optimal transport: distributions of rewards are ordered, not single pairs.

A value belongs to a rank in the global batch, so that no weight and no label of a single pair can be its own: pairs
weigh the same, and labels are hard or robust. The order of the pairs never matters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

    from conf.schema import LossConfig
    from learners.losses.base import LossInput


def aot(inputs: LossInput, config: LossConfig) -> Tensor:
    """-log sigmoid(beta (u_(i) - v_(i))) of the i-th smallest u and v, one value a rank.

    Melnyk et al. 2024, "Distributional Preference Alignment of LLMs via Optimal Transport" (arXiv:2406.05882), paired
    form: u = log pi(chosen) - log pi(rejected), and v the same of the reference.

    Reduces over the global batch: the sorting.

    Returns:
        [P] by rank, not by pair.
    """
    policy = inputs.logprob_chosen - inputs.logprob_rejected
    reference = inputs.reference_chosen - inputs.reference_rejected
    return -F.logsigmoid(config.beta * (policy.sort().values - reference.sort().values))


def aot_unpaired(inputs: LossInput, config: LossConfig) -> Tensor:
    """-log sigmoid(beta (h_w(i) - h_l(i))) of the i-th smallest h of chosen and of rejected, one value a rank.

    The same paper, unpaired form. Reduces over the global batch: the sorting.

    Returns:
        [P] by rank, not by pair.
    """
    chosen, rejected = inputs.log_ratio_chosen.sort().values, inputs.log_ratio_rejected.sort().values
    return -F.logsigmoid(config.beta * (chosen - rejected))
