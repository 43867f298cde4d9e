"""What `pipeline.mode` means to the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conf.schema import Config


def max_staleness(config: Config) -> int:
    """How many updates older than the learner's the weights may be that sample what it is trained on."""
    return config.pipeline.max_staleness if config.pipeline.mode == "async" else 0


def grows_old(config: Config) -> bool:
    """Whether other weights than the learner's may have sampled a pair."""
    return max_staleness(config) > 0
