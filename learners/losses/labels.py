"""What the label of a pair is taken for: any objective of pairs l becomes p l(pair) + (1 - p) l(pair turned round).

    hard       p = 1 - eps: eps = 0 believes the judge; eps > 0 is the conservative DPO of Mitchell 2023, "A note on DPO
               with noisy preferences", equation 3
    robust     the same, made unbiased: [(1 - eps) l - eps l'] / (1 - 2 eps), Chowdhury et al. 2024, "Provably Robust
               DPO" (arXiv:2403.00409), equation 10; may be negative
    soft       p = the judge's own probability; with how far two policies rank alike (`judge.consistency`) it is CREAM
               (Wang et al. 2024, arXiv:2410.12735, equation 7), with strengths of preference OSP (Zhai et al. 2024,
               arXiv:2405.14103)
    posterior  p = the probability that the label is right given its loss, LCPO: see `posterior`
    denoised   p = 1 - eps for pairs the policy is unsure of, SPA: see `denoised`

with eps = `loss.label_smoothing`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from conf.schema import LossConfig
    from learners.losses.base import LossInput
    from learners.losses.state import LossState

WINDOW, LEAST_CONFIDENT, WARM = 50, 0.1, 0.2
"""SPA: margins remembered, share of them that counts as unsure, and of the iteration during which labels are kept."""
NOISE_LIMITS = (1e-3, 0.5 - 1e-3)


def relabelled(loss: Callable[[LossInput], Tensor], inputs: LossInput, config: LossConfig, state: LossState) -> Tensor:
    """[P] the loss under `config.labels`."""
    eps = config.label_smoothing
    if config.labels == "hard" and not eps:
        return loss(inputs)
    right, wrong = loss(inputs), loss(inputs.swapped())
    match config.labels:
        case "robust":
            return ((1 - eps) * right - eps * wrong) / (1 - 2 * eps)
        case "soft":
            p = inputs.labels
        case "posterior":
            p = posterior(right, wrong, _noise(config, state))
        case "denoised":
            p = denoised(inputs, config, state)
        case _:
            return (1 - eps) * right + eps * wrong
    return p * right + (1 - p) * wrong


def posterior(right: Tensor, wrong: Tensor, noise: float) -> Tensor:
    """[P] (1 - eta) e^-l / ((1 - eta) e^-l + eta e^-l'), without gradient: how probably each label is right.

    Label-confidence preference optimization: eta, the share of wrong labels, starts at `loss.label_smoothing` and
    follows the mean of 1 - p over global batches with `loss.noise_decay`.
    """
    odds = torch.as_tensor(noise, dtype=right.dtype, device=right.device).logit()
    return torch.sigmoid((wrong - right).detach() - odds)


def denoised(inputs: LossInput, config: LossConfig, state: LossState) -> Tensor:
    """[P] 1 where beta Delta is above a threshold, else 1 - eps; without gradient.

    Kim et al. 2024, "Spread Preference Annotation: Direct Preference Judgment for Efficient LLM Alignment"
    (arXiv:2406.04412), equation 9: the threshold is the 10 % quantile of the last 50 margins, this batch's among them,
    and labels are kept as they are in the first fifth of an iteration's steps. Margins are the policy's own, as the
    released code's defaults have it; the paper extrapolates its logits away from the reference.

    Reduces over the last 50 margins of global batches.
    """
    margins = _margins(inputs, state)
    threshold = torch.quantile(torch.tensor(margins, dtype=torch.float64), LEAST_CONFIDENT).item()
    sure = (inputs.beta * inputs.margin).detach() > threshold
    eps = config.label_smoothing if state.progress >= WARM else 0.0
    return 1 - eps * (~sure).to(inputs.logprobs.dtype)


def label_state(
    loss: Callable[[LossInput], Tensor], inputs: LossInput, config: LossConfig, state: LossState
) -> LossState:
    """What is remembered after a step on the global batch `inputs`."""
    match config.labels:
        case "posterior":
            noise = _noise(config, state)
            p = posterior(loss(inputs), loss(inputs.swapped()), noise)
            mixed = config.noise_decay * noise + (1 - config.noise_decay) * float((1 - p).mean())
            return replace(state, noise=min(max(mixed, NOISE_LIMITS[0]), NOISE_LIMITS[1]))
        case "denoised":
            return replace(state, margins=_margins(inputs, state))
        case _:
            return state


def _noise(config: LossConfig, state: LossState) -> float:
    noise = config.label_smoothing if state.noise is None else state.noise
    return min(max(noise, NOISE_LIMITS[0]), NOISE_LIMITS[1])


def _margins(inputs: LossInput, state: LossState) -> tuple[float, ...]:
    return (*state.margins, *(inputs.beta * inputs.margin).detach().tolist())[-WINDOW:]
