"""Which pairs are kept, and why the others were not."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from orchestrator.types import FinishReason

if TYPE_CHECKING:
    from collections.abc import Sequence

    from conf.schema import FilterConfig
    from orchestrator.types import PreferencePair


def filter_pairs(pairs: Sequence[PreferencePair], config: FilterConfig) -> tuple[list[PreferencePair], Counter[str]]:
    """The pairs that pass every filter, in their order, and how many were dropped for each reason.

    A pair is counted once, under the first reason that applies: `identical`, `truncated_chosen`, `length_ratio`.
    """
    kept, dropped = [], Counter[str]()
    for pair in pairs:
        reason = reason_to_drop(pair, config)
        if reason is None:
            kept.append(pair)
        else:
            dropped[reason] += 1
    return kept, dropped


def reason_to_drop(pair: PreferencePair, config: FilterConfig) -> str | None:
    """The first reason against a pair; None when there is none."""
    if config.drop_identical and pair.chosen.token_ids == pair.rejected.token_ids:
        return "identical"
    if config.drop_truncated_chosen and pair.chosen.finish_reason is FinishReason.LENGTH:
        return "truncated_chosen"
    shorter, longer = sorted((len(pair.chosen.token_ids), len(pair.rejected.token_ids)))
    if config.max_length_ratio is not None and longer > config.max_length_ratio * shorter:
        return "length_ratio"
    return None
