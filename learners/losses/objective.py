"""The composed objective: one preference term under its labels and weights, and what is added to it.

values = weight [ labels(term(inputs with token weights and betas)) x wpo + sft + exploration + kl ]
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from conf.objectives import OBJECTIVES, PAIR_LABELS
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
        ValueError: unequal weights of pairs, or labels that differ from pair to pair, for one whose values are by rank.
    """
    objective = OBJECTIVES.get(config.name)
    if objective is not None and objective.by_rank:
        _check_equal(inputs, config)
    inputs = with_beta(with_token_weights(inputs, config), config, state)
    values = relabelled(partial(term, config=config, state=state), inputs, config, state)
    if config.weighting == "wpo":
        values = values * wpo(inputs)
    added, weights = extras(inputs, config), inputs.weights
    if objective is not None and objective.unit == "group":
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


def _check_equal(inputs: LossInput, config: LossConfig) -> None:
    """Values by rank have no pair whose weight or label could be theirs."""
    per_pair = config.labels in PAIR_LABELS or config.weighting != "none"
    if per_pair or not bool((inputs.weights == inputs.weights[:1]).all()):
        raise ValueError(
            f"loss.name={config.name} orders whole distributions, so that its values belong to no pair, but"
            f" loss.labels={config.labels}, loss.weighting={config.weighting} and weights from"
            f" {inputs.weights.min():g} to {inputs.weights.max():g} are of pairs: weigh all pairs alike"
        )
