"""The objective that a language model discovered."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

    from conf.schema import LossConfig
    from learners.losses.base import LossInput

TEMPERATURE = 0.05
_LARGEST_EXPONENT = 80.0


def discopop(inputs: LossInput, config: LossConfig) -> Tensor:
    """(1 - s) (-log sigmoid(z)) + s exp(-z) with z = beta Delta and s = sigmoid(z / 0.05), one value a pair.

    Lu et al. 2024, "Discovering Preference Optimization Algorithms with and for Large Language Models"
    (arXiv:2406.08414), equation 7 (log-ratio modulated loss). Not convex.

    Returns:
        [P]
    """
    logits = inputs.beta * inputs.margin
    share = torch.sigmoid(logits / TEMPERATURE)
    return -(1 - share) * F.logsigmoid(logits) + share * torch.exp((-logits).clamp(max=_LARGEST_EXPONENT))
