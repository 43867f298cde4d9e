"""Judges by the name of `scorer.kind`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from actors.judges.verifier import build_verifier
from orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from actors.judges.base import Scorer
    from conf.schema import JudgeConfig, ScorerConfig


def build_scorer(config: ScorerConfig, judge: JudgeConfig | None = None, *, has_answers: bool = True) -> Scorer:
    """The scorer that `config` describes, of the kinds that need no engine.

    Args:
        config: Kind of the judge and its settings.
        judge: Settings of those that are models.
        has_answers: Whether the task has reference answers (`Task.has_answers`).

    Raises:
        ConfigError: An unknown kind, a judge that needs answers for a task without, or a function that cannot be used.
    """
    if config.kind in ("preference_model", "reward_model"):
        return _build_trained(config, judge)
    if config.kind != "verifier":
        raise ConfigError(
            f"scorer.kind={config.kind!r} runs in no scorer; choose verifier, preference_model or reward_model."
        )
    if config.verifier != "function" and not has_answers:
        raise ConfigError(
            f"scorer.verifier={config.verifier} compares with reference answers, and the task has none. Name their "
            "field in task.answer_field, or judge with scorer.verifier=function."
        )
    return build_verifier(config)


def _build_trained(config: ScorerConfig, judge: JudgeConfig | None) -> Scorer:
    """A judge that is a folder of `agon train-judge`. Imports torch, which the scorers by rule do without."""
    if judge is None or judge.model is None:
        raise ConfigError(f"scorer.kind={config.kind} needs judge.model, the folder of the judge.")
    if config.kind == "preference_model":
        from actors.judges.preference_model import build_preference_scorer

        return build_preference_scorer(judge.model, judge)
    from actors.judges.reward_model import build_reward_scorer

    return build_reward_scorer(judge.model)
