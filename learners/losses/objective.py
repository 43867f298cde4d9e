"""The composed objective: one preference term under its labels and weights, and what is added to it.

values = weight [ labels(term(inputs with token weights and betas)) x wpo + sft + exploration + kl ]
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from conf.objectives import OBJECTIVES
from learners.losses.bco import bco_state
from learners.losses.extras import extras
from learners.losses.labels import label_state, relabelled
from learners.losses.registry import term
from learners.losses.weighting import beta_state, with_beta, with_token_weights, wpo

if TYPE_CHECKING:
    from torch import Tensor

    from conf.schema import LossConfig
    from learners.losses.base import LossInput
    from learners.losses.state import LossState


def losses(inputs: LossInput, config: LossConfig, state: LossState) -> Tensor:
    """The weighted values whose sum over the global batch, divided by their number, is the loss.

    Args:
        inputs: one micro-batch; the whole global batch where `conf.objectives.is_coupled`.
        config: the objective.
        state: what it remembers.

    Returns:
        [P], or [G] for objectives of groups, whose pairs' weights and extra terms are averaged.

    Raises:
        ConfigError: no objective has the configured name.
    """
    inputs = with_beta(with_token_weights(inputs, config), config, state)
    values = relabelled(partial(term, config=config, state=state), inputs, config, state)
    if config.weighting == "wpo":
        values = values * wpo(inputs)
    added, weights = extras(inputs, config), inputs.weights
    if OBJECTIVES[config.name].unit == "group":
        weights = inputs.group_mean(weights)
        added = None if added is None else inputs.group_mean(added)
    return weights * (values if added is None else values + added)


def advance(inputs: LossInput, config: LossConfig, state: LossState) -> LossState:
    """What is remembered after a step on the global batch `inputs`, without gradient."""
    weighted = with_token_weights(inputs, config)
    scaled = with_beta(weighted, config, state)
    after = label_state(partial(term, config=config, state=state), scaled, config, state)
    after = beta_state(weighted, config, after)
    return bco_state(scaled, config, after) if config.name == "bco" else after
