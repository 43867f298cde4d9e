"""Binary classifier optimization."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

    from conf.schema import LossConfig
    from learners.losses.base import LossInput
    from learners.losses.state import LossState


def bco(inputs: LossInput, config: LossConfig, state: LossState) -> Tensor:
    """Half of -log sigmoid(beta h_w - delta) - log sigmoid(-(beta h_l - delta)), one value a pair.

    Jung et al. 2024, "Binary Classifier Optimization for Large Language Model Alignment" (arXiv:2404.04656), equation
    13: delta is the mean of beta h over all chosen and rejected completions so far. The half makes the mean over pairs
    the mean over completions.

    Reduces over the global batch and all before it: delta.

    Returns:
        [P]
    """
    return shifted(inputs, bco_state(inputs, config, state).reward_mean) / 2


def bco_pair(inputs: LossInput, config: LossConfig) -> Tensor:
    """-log sigmoid(beta h_w) - log sigmoid(-beta h_l): the classifier without a shift, one value a pair.

    Returns:
        [P]
    """
    return shifted(inputs, 0.0)


def shifted(inputs: LossInput, delta: float) -> Tensor:
    """[P] both sides' losses of a classifier whose threshold is `delta`."""
    return -F.logsigmoid(inputs.beta * inputs.log_ratio_chosen - delta) - F.logsigmoid(
        delta - inputs.beta * inputs.log_ratio_rejected
    )


def bco_state(inputs: LossInput, config: LossConfig, state: LossState) -> LossState:
    """The running mean with this batch's rewards taken in."""
    rewards = torch.cat([inputs.log_ratio_chosen, inputs.log_ratio_rejected]).detach() * inputs.beta.repeat(2)
    seen = state.rewards_seen + len(rewards)
    mean = state.reward_mean + (float(rewards.sum()) - len(rewards) * state.reward_mean) / seen
    return replace(state, reward_mean=mean, rewards_seen=seen)
