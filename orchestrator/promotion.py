"""Whether the policy of an iteration is fit to be the next data policy: told from its evaluation and the one before."""

from __future__ import annotations

import math
from statistics import fmean
from typing import TYPE_CHECKING

from orchestrator.metrics import wilson_interval

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from conf.schema import PromotionConfig
    from orchestrator.types import ScoredGroup


def comparison_figures(
    greedy: Sequence[ScoredGroup],
    sampled: Sequence[ScoredGroup],
    greedy_before: Sequence[ScoredGroup],
    sampled_before: Sequence[ScoredGroup],
) -> dict[str, float]:
    """How the answers of a policy compare with those of the one before, on the prompts that both answered.

    Returns:
        `eval/win_rate` with `_low` and `_high` (95 %, Wilson, ties as half wins, which makes it conservative), over
        greedy answers of which at least one was scored: an answer that says nothing to the scorer loses against one
        that does. And `eval/length_ratio`, of the mean lengths of sampled answers in
        tokens. Empty where there is nothing to compare.
    """
    before, now = _values(greedy_before), _values(greedy)
    wins = [
        (value > before[prompt]) + 0.5 * (value == before[prompt])
        for prompt, value in now.items()
        if prompt in before and max(value, before[prompt]) > -math.inf
    ]
    lengths_before = _lengths(sampled_before)
    shared = {prompt: length for prompt, length in _lengths(sampled).items() if prompt in lengths_before}
    if not wins or not shared:
        return {}
    low, high = wilson_interval(sum(wins), len(wins))
    ratio = fmean(shared.values()) / max(fmean(lengths_before[prompt] for prompt in shared), 1.0)
    return {
        "eval/win_rate": fmean(wins),
        "eval/win_rate_low": low,
        "eval/win_rate_high": high,
        "eval/length_ratio": ratio,
    }


def alarms(config: PromotionConfig, metrics: Mapping[str, float], earlier: Iterable[Mapping[str, float]]) -> list[str]:
    """What speaks against the policy of an iteration, a sentence each; empty where nothing does.

    Args:
        config: where alarms begin.
        metrics: of the iteration.
        earlier: those of the iterations before it.
    """
    found = []
    if metrics.get("eval/win_rate_high", 1.0) < config.min_win_rate:
        found.append(
            f"its answers win {metrics['eval/win_rate']:.1%} [{metrics['eval/win_rate_low']:.1%},"
            f" {metrics['eval/win_rate_high']:.1%}] over those of the policy before"
            f" (promotion.min_win_rate={config.min_win_rate:g})"
        )
    if metrics.get("eval/length_ratio", 1.0) > config.max_length_ratio:
        found.append(
            f"its answers are {metrics['eval/length_ratio']:.2f} times as long as those of the policy before"
            f" (promotion.max_length_ratio={config.max_length_ratio:g})"
        )
    known = [skill for figures in earlier if (skill := _judge_skill(figures)) is not None]
    now = _judge_skill(metrics)
    if now is not None and known and now < max(known) - config.max_judge_drop:
        found.append(
            f"the judge orders {now:.1%} of the anchors right, {max(known):.1%} before; what it leaves open counts half"
            f" (promotion.max_judge_drop={config.max_judge_drop:g})"
        )
    return found


def _values(scored: Sequence[ScoredGroup]) -> dict[str, float]:
    """The score of each prompt's answer; below all others where there is none."""
    values = {one.group.prompt.id: one.scores[0].value for one in scored}
    return {prompt: -math.inf if value is None else value for prompt, value in values.items()}


def _judge_skill(figures: Mapping[str, float]) -> float | None:
    """Share of the anchors that the judge orders right; a coin's where it says nothing. None: it was not measured."""
    answered = figures.get("judge/answered", 1.0)
    accuracy = figures.get("judge/accuracy", None if answered else 0.5)
    return None if accuracy is None else answered * accuracy + (1 - answered) * 0.5


def _lengths(scored: Sequence[ScoredGroup]) -> dict[str, int]:
    return {one.group.prompt.id: len(one.group.completions[0].token_ids) for one in scored}
