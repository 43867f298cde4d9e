"""Direct preference optimization, with conservative labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

    from conf.schema import LossConfig
    from learners.losses.base import LossInput


def dpo(inputs: LossInput, config: LossConfig) -> Tensor:
    """-(1 - eps) log sigmoid(beta Delta) - eps log sigmoid(-beta Delta), one value a pair.

    eps = 0 is DPO (Rafailov et al. 2023, "Direct Preference Optimization", eq. 7); eps > 0 is the conservative DPO of
    the same authors (Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO", eq. 3), whose
    minimum lies at beta Delta = logit(1 - eps). Delta is a sum over tokens.

    Returns:
        [P]
    """
    logits = config.beta * inputs.margin
    smoothing = config.label_smoothing
    return -(1 - smoothing) * F.logsigmoid(logits) - smoothing * F.logsigmoid(-logits)
