"""The registry of preference losses: a new one is a file beside these and a line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from learners.losses.base import LossInput, PairLoss
from learners.losses.dpo import dpo
from learners.losses.sft import chosen_nll
from learners.losses.sppo import sppo
from orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from conf.schema import LossConfig

__all__ = ["LOSSES", "LossInput", "PairLoss", "pair_losses"]

LOSSES: dict[str, PairLoss] = {"dpo": dpo, "sppo": sppo}
"""Preference terms by `LossConfig.name`."""


def pair_losses(inputs: LossInput, config: LossConfig) -> Tensor:
    """The preference term plus `sft_weight` times the chosen completion's token-mean NLL.

    Returns:
        [P]

    Raises:
        ConfigError: no preference term has the configured name.
    """
    if config.name not in LOSSES:
        raise ConfigError(f"loss.name is {config.name!r}; it must be one of {', '.join(sorted(LOSSES))}")
    losses = LOSSES[config.name](inputs, config)
    if config.sft_weight:
        losses = losses + config.sft_weight * chosen_nll(inputs)
    return losses
