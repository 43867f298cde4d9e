"""Who judges, as a configuration has it: which kinds, and with whose engines."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conf.schema import Config

TRAINED_KINDS = ("preference_model", "reward_model")
"""Kinds of scorers whose `judge.model` is a folder that `agon train-judge` writes."""
READING_KINDS = ("llm_judge", "step_judge")
"""Kinds of scorers that are language models and read what they judge."""
POOLED_KINDS = ("verifier", *TRAINED_KINDS)
"""Kinds of scorers that run in scorer actors; the others ask the engines of generators or judges."""


def judge_kinds(config: Config) -> tuple[str, ...]:
    """Kinds of the scorers whose word trains: `scorer.kind`, or the members of an ensemble."""
    return tuple(config.judge.members) if config.scorer.kind == "ensemble" else (config.scorer.kind,)


def compares(config: Config) -> bool:
    """Whether the judge says how probably one completion is better than another, instead of scoring each."""
    return config.scorer.kind in ("preference_model", "ensemble") or (
        config.scorer.kind == "llm_judge" and config.judge.style == "pairwise"
    )


def gives_labels(config: Config) -> bool:
    """Whether pairs have labels other than 1: of a judge that compares, of consistency, or of a search's visits."""
    return compares(config) or config.judge.consistency != "none" or config.search.kind != "none"


def pooled_kinds(config: Config) -> tuple[str, ...]:
    """Kinds of the scorers that get actors: those whose word trains, and the verifier where it evaluates."""
    kinds = [kind for kind in judge_kinds(config) if kind in POOLED_KINDS]
    if config.evaluation.scorer == "verifier":
        kinds.append("verifier")
    return tuple(dict.fromkeys(kinds))


def trained_kind(config: Config) -> str | None:
    """The kind of the judge that `judge.model` then is: one that `agon train-judge` writes."""
    return next((kind for kind in judge_kinds(config) if kind in TRAINED_KINDS), None)


def own_language_model(config: Config) -> str | None:
    """`judge.model` where it is a language model; None: judges read with the policy, or with the initial one."""
    return config.judge.model if trained_kind(config) is None else None


def reads_with_own(config: Config) -> bool:
    """Whether judges that read do so with engines of their own, not with the policy's."""
    return config.judge.engine == "own" or own_language_model(config) is not None


def asks_reader(config: Config) -> bool:
    """Whether a judge reads, or a search asks one about its steps."""
    return not set(READING_KINDS).isdisjoint(judge_kinds(config)) or config.search.evaluation_weight > 0


def has_own_judge(config: Config) -> bool:
    """Whether a judge has engines of its own, with weights that never change."""
    return "implicit" in judge_kinds(config) or (reads_with_own(config) and asks_reader(config))


def asks_policy(config: Config) -> bool:
    """Whether the policy's own engines judge, or say what a search goes on with: a wave then needs the same ones."""
    return (
        config.search.kind != "none"
        or "implicit" in judge_kinds(config)
        or (asks_reader(config) and not reads_with_own(config))
    )


def needs_main_thread(config: Config) -> bool:
    """Whether whoever makes pairs compares formulas, which a signal breaks off where it takes for ever."""
    return "majority" in judge_kinds(config) and config.scorer.verifier == "math"
