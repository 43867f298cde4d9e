"""AdamW, and its moments as tensors with names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor, nn

    from conf.schema import LearnerConfig

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def new_optimizer(parameters: Mapping[str, nn.Parameter], learner: LearnerConfig) -> torch.optim.Optimizer:
    """AdamW without moments; matrices decay, norms and biases do not."""
    all_of_them = list(parameters.values())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in all_of_them if p.ndim > 1], "weight_decay": learner.weight_decay},
        {"params": [p for p in all_of_them if p.ndim <= 1], "weight_decay": 0.0},
    ]
    # On a CPU torch would go over each tensor a dozen times; elsewhere its default is as good.
    fused = True if all(p.device.type == "cpu" for p in all_of_them) else None
    return torch.optim.AdamW(groups, lr=learner.lr, betas=(learner.adam_beta1, learner.adam_beta2), fused=fused)


def moments(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's own tensors as ``<moment>.<parameter>``, of the parameters that have moved."""
    return {
        f"{moment}.{name}": optimizer.state[parameter][moment]
        for name, parameter in parameters.items()
        for moment in _MOMENTS
        if parameter in optimizer.state
    }


def add_moments(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], names: Collection[str]
) -> dict[str, Tensor]:
    """Gives moments of 0 to the parameters that have some among `names`, and returns them as `moments` does.

    Adam counts its steps on the host; its moments lie with the parameter.
    """
    for name, parameter in parameters.items():
        if f"step.{name}" in names:
            optimizer.state[parameter] = {
                moment: torch.zeros(()) if moment == "step" else torch.zeros_like(parameter.detach())
                for moment in _MOMENTS
            }
    return moments(optimizer, parameters)
