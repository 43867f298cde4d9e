"""How strongly pairs count: by their likelihood, by the judge's margin, or by single tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from learners.losses.base import LossInput

if TYPE_CHECKING:
    from torch import Tensor

    from conf.schema import LossConfig
    from learners.losses.state import LossState

LOWEST_SCALE = 0.1
"""An implicit beta never falls below this share of `loss.beta`."""


def wpo(inputs: LossInput) -> Tensor:
    """[P] w_w w_l, without gradient, w = exp(mean over tokens of log pi(y_t) - log sum_v pi(v)^2), at most 1.

    Zhou et al. 2024, "WPO: Enhancing RLHF with Weighted Preference Optimization" (arXiv:2406.11827), equation 4 with
    its sampled alignment: pairs that the policy would hardly have sampled count less.
    """
    assert inputs.log_collision is not None, "the step asks the policy for it"
    weights = replace(inputs, logprobs=(inputs.logprobs - inputs.log_collision).detach())
    means = weights.logprob / weights.lengths
    return (means[inputs.chosen] + means[inputs.rejected]).exp().clamp(max=1)


def with_beta(inputs: LossInput, config: LossConfig, state: LossState) -> LossInput:
    """The input with the beta of each pair.

        none      beta
        margin    beta (1 + w (1 - exp(-k (r_w - r_l)))): Zhang et al. 2025, "MM-RLHF" (arXiv:2502.10391), equation 9
        implicit  beta (1 + w (M - M0)), one for the batch, at least a tenth of beta; M is the mean of beta Delta over
                  the global batch and M0 its running mean: Wu et al. 2024, "beta-DPO" (arXiv:2407.08639), equation 7,
                  without its filter

    with w = `loss.beta_scale` and k = `loss.beta_slope`. Reduces over the global batch and all before it: implicit.
    """
    match config.beta_scaling:
        case "margin":
            factor = 1 + config.beta_scale * -torch.expm1(-config.beta_slope * inputs.score_margin)
        case "implicit":
            mean = _mean_margin(inputs)
            known = mean if state.margin_mean is None else state.margin_mean
            factor = torch.full_like(inputs.beta, max(LOWEST_SCALE, 1 + config.beta_scale * (mean - known)))
        case _:
            return inputs
    return replace(inputs, beta=inputs.beta * factor)


def beta_state(inputs: LossInput, config: LossConfig, state: LossState) -> LossState:
    """What is remembered after a step on the global batch `inputs`, whose betas are not scaled."""
    if config.beta_scaling != "implicit":
        return state
    mean = _mean_margin(inputs)
    if state.margin_mean is not None:
        mean = config.noise_decay * state.margin_mean + (1 - config.noise_decay) * mean
    return replace(state, margin_mean=mean)


def _mean_margin(inputs: LossInput) -> float:
    return float((inputs.beta * inputs.margin).detach().mean())


def with_token_weights(inputs: LossInput, config: LossConfig) -> LossInput:
    """The input with the tail of the longer completion of each pair weighted by `loss.tail_weight`.

    Liu et al. 2024, "Length Desensitization in Direct Preference Optimization" (arXiv:2409.06411), equation 8: tokens
    up to the length that both have count fully. Weights that the pairs bring along (Mask-DPO, Gu et al. 2025,
    arXiv:2503.02846: 0 for tokens that are left out) are kept and multiplied.
    """
    if config.tail_weight == 1:
        return inputs
    shared = torch.minimum(inputs.lengths[inputs.chosen], inputs.lengths[inputs.rejected])
    chosen = _tail(inputs, inputs.chosen, shared, inputs.chosen_token_weights, config.tail_weight)
    rejected = _tail(inputs, inputs.rejected, shared, inputs.rejected_token_weights, config.tail_weight)
    return replace(inputs, chosen_token_weights=chosen, rejected_token_weights=rejected)


def _tail(inputs: LossInput, side: Tensor, shared: Tensor, given: Tensor | None, weight: float) -> Tensor:
    lengths = inputs.lengths[side]
    starts = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    place = torch.arange(len(starts), device=starts.device) - starts
    weights = torch.where(place < torch.repeat_interleave(shared, lengths), 1.0, weight).to(inputs.logprobs.dtype)
    return weights if given is None else weights * given
