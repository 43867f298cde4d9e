"""Which keys have no effect beside the others: a table of what is read when.

Files may set such keys, because another choice makes them moot: a recipe's `judge.votes` beside `scorer=verifier`. What
a person sets is meant to change the run, and is refused where it cannot (`conf/compose.py`).
"""

from __future__ import annotations

from dataclasses import fields
from fnmatch import fnmatchcase
from functools import cache
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

from conf.judging import (
    TRAINED_KINDS,
    asks_reader,
    gives_labels,
    has_own_judge,
    judge_kinds,
    pooled_kinds,
    trained_kind,
)
from conf.layers import knobs
from conf.objectives import OBJECTIVES, loss_keys_read
from conf.schema import LossConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from conf.schema import Config


class Rule(NamedTuple):
    """Keys that are read only where something holds."""

    keys: str
    """Patterns of dotted keys, separated by spaces."""
    decider: str
    """The key whose value is to blame; never one of `keys`."""
    read: Callable[[Config], bool]
    mend: str
    """Where they are read, for people."""


def unread(config: Config) -> dict[str, str]:
    """Keys without effect, and why: ``{"loss.gamma": "not read with loss.name=dpo, but with loss.name=slic"}``."""
    found: dict[str, str] = {}
    for rule in RULES:
        if not rule.read(config):
            why = f"not read with {rule.decider}={attrgetter(rule.decider)(config)}, but with {rule.mend}"
            for key in _matching(rule):
                found.setdefault(key, why)
    return found


@cache
def _matching(rule: Rule) -> list[str]:
    patterns = rule.keys.split()
    return [key for key in knobs() if key != rule.decider and any(fnmatchcase(key, each) for each in patterns)]


def _judges(*kinds: str) -> Callable[[Config], bool]:
    """Whether one of these kinds judges, alone or in an ensemble."""
    return lambda config: not set(kinds).isdisjoint(judge_kinds(config))


def _makes_judge(config: Config) -> bool:
    return trained_kind(config) is not None and config.judge.model is None


RULES = [
    Rule("model.tiny.*", "model.kind", lambda c: c.model.kind == "tiny", "model=tiny"),
    Rule("task.digits", "task.kind", lambda c: c.task.kind == "addition" or c.model.kind == "tiny", "task=addition"),
    Rule("task.test_* task.*_field", "task.kind", lambda c: c.task.kind != "addition", "task=prompts"),
    Rule("task.test_fraction", "task.test_path", lambda c: c.task.test_path is None, "task.test_path=null"),
    Rule(
        "search.rubric search.show_answer search.depth_penalty",
        "search.evaluation_weight",
        lambda c: c.search.evaluation_weight > 0,
        "one above 0",
    ),
    Rule("search.*", "search.kind", lambda c: c.search.kind != "none", "search=mcts"),
    Rule("generator.samples_per_prompt pairing.*", "search.kind", lambda c: c.search.kind == "none", "search=none"),
    Rule(
        "pairing.length_control",
        "pairing.policy",
        lambda c: c.pairing.policy == "length_controlled",
        "pairing=length_controlled",
    ),
    Rule(
        "pairing.max_pairs",
        "pairing.policy",
        lambda c: c.pairing.policy in ("best_worst", "all"),
        "pairing=best_worst or all",
    ),
    # The rule of the task is asked by a verifier that trains or evaluates, for the answers that a majority counts, and
    # when a tiny judge is made.
    Rule(
        "scorer.verifier scorer.function scorer.marker scorer.call_*",
        "scorer.kind",
        lambda c: "verifier" in pooled_kinds(c) or "majority" in judge_kinds(c) or _makes_judge(c),
        "evaluation.scorer=verifier",
    ),
    Rule(
        "scorer.marker",
        "scorer.verifier",
        lambda c: c.scorer.verifier == "final_answer",
        "scorer.verifier=final_answer",
    ),
    Rule(
        "scorer.call_*",
        "scorer.verifier",
        lambda c: c.scorer.verifier in ("function", "tests"),
        "scorer.verifier=function or tests",
    ),
    Rule(
        "scorer.num_actors scorer.cpus_per_actor scorer.restarts scorer.*deadline_s",
        "scorer.kind",
        lambda c: bool(pooled_kinds(c)),
        "evaluation.scorer=verifier",
    ),
    Rule("judge.members judge.min_agreement", "scorer.kind", lambda c: c.scorer.kind == "ensemble", "scorer=ensemble"),
    Rule("judge.engine", "scorer.kind", asks_reader, "llm_judge, step_judge or search.evaluation_weight"),
    Rule(
        "judge.model",
        "scorer.kind",
        lambda c: asks_reader(c) or _judges(*TRAINED_KINDS, "implicit")(c),
        "a judge that is a model",
    ),
    Rule(
        "judge.deadline_s",
        "scorer.kind",
        lambda c: asks_reader(c) or _judges("implicit")(c),
        "llm_judge, step_judge, implicit",
    ),
    Rule("judge.max_failed_fraction", "scorer.kind", asks_reader, "llm_judge or step_judge"),
    Rule(
        "judge.style judge.verdict judge.rubric judge.principles"
        " judge.votes judge.temperature judge.top_p judge.max_tokens",
        "scorer.kind",
        _judges("llm_judge"),
        "llm_judge",
    ),
    Rule(
        "judge.votes judge.temperature judge.top_p judge.max_tokens",
        "judge.verdict",
        lambda c: c.judge.verdict == "words",
        "judge.verdict=words",
    ),
    Rule("judge.votes judge.top_p", "judge.temperature", lambda c: c.judge.temperature > 0, "one above 0"),
    Rule("judge.head judge.derive judge.yes judge.no", "scorer.kind", _judges("step_judge"), "step_judge"),
    Rule("judge.length_normalized judge.consistency", "scorer.kind", _judges("implicit"), "implicit"),
    Rule("judge.win_probability judge.score", "scorer.kind", _judges("preference_model"), "preference_model"),
    Rule(
        "judge.num_actors judge.gpus_per_actor",
        "scorer.kind",
        lambda c: asks_reader(c) or _judges(*TRAINED_KINDS, "implicit")(c),
        "a judge that is a model",
    ),
    Rule("judge.num_actors", "judge.engine", has_own_judge, "judge.engine=own, a judge.model that reads, or implicit"),
    Rule(
        "judge.gpus_per_actor",
        "judge.engine",
        lambda c: has_own_judge(c) or _judges(*TRAINED_KINDS)(c),
        "judge.engine=own, implicit, preference_model or reward_model",
    ),
    Rule(
        "evaluation.anchors",
        "evaluation.scorer",
        lambda c: c.evaluation.scorer == "verifier",
        "evaluation.scorer=verifier",
    ),
    Rule("evaluation.anchors", "scorer.kind", lambda c: c.scorer.kind != "verifier", "another judge, to be measured"),
    Rule(
        "evaluation.problems evaluation.every evaluation.temperature evaluation.kl_prompts",
        "evaluation.scorer",
        lambda c: c.evaluation.scorer != "none",
        "evaluation.scorer=verifier or judge",
    ),
    Rule("promotion.*", "promotion.gate", lambda c: c.promotion.gate != "off", "promotion.gate=alarm or reject"),
    Rule(
        "promotion.gate promotion.min_win_rate promotion.max_length_ratio",
        "evaluation.scorer",
        lambda c: c.evaluation.scorer != "none",
        "evaluation.scorer=verifier or judge",
    ),
    Rule(
        "promotion.max_judge_drop",
        "evaluation.scorer",
        lambda c: c.evaluation.scorer == "verifier",
        "evaluation.scorer=verifier",
    ),
    Rule("promotion.max_judge_drop", "evaluation.anchors", lambda c: c.evaluation.anchors > 0, "one above 0"),
    Rule(
        "promotion.max_judge_drop",
        "scorer.kind",
        lambda c: c.scorer.kind != "verifier",
        "another judge, to be measured",
    ),
    Rule(
        "pipeline.max_staleness pipeline.over_issue loss.importance_clip",
        "pipeline.mode",
        lambda c: c.pipeline.mode == "async",
        "pipeline.mode=async",
    ),
    Rule("reference.ema_decay", "reference.kind", lambda c: c.reference.kind == "ema", "reference=ema"),
    Rule(
        "learner.replay_path learner.replay_weight",
        "learner.replay_sequences",
        lambda c: c.learner.replay_sequences > 0,
        "one above 0",
    ),
    Rule(
        "loss.labels",
        "scorer.kind",
        lambda c: c.loss.labels != "soft" or gives_labels(c),
        "a judge that compares (preference_model, ensemble, llm_judge with judge.style=pairwise), or with a search",
    ),
]

_GATES = {
    "label_smoothing": ("labels", "other labels"),
    "sft_target": ("sft_weight", "one above 0"),
    "exploration_weight": ("exploration", "loss.exploration=selm or xpo"),
    "beta_scale": ("beta_scaling", "loss.beta_scaling=margin or implicit"),
    "beta_slope": ("beta_scaling", "loss.beta_scaling=margin"),
    "noise_decay": ("labels", "loss.labels=posterior or loss.beta_scaling=implicit"),
    "divergence_alpha": ("divergence", "loss.divergence=alpha"),
}
"""Keys of `loss.*` that count only beside another key of it."""
_FEW = 6


def _of_loss(key: str) -> list[Rule]:
    """What is to blame is an objective that never reads the key, else a value beside it."""
    term = "beta_scaling" if key in ("beta_scale", "beta_slope") else key
    names = [name for name, facts in OBJECTIVES.items() if term in facts.reads]
    mend = f"loss.name={', '.join(names)}" if len(names) <= _FEW else "others (docs/losses.md)"

    def changes(config: Config) -> bool:
        return key in loss_keys_read(config.loss) or (key == "beta" and "implicit" in judge_kinds(config))

    def of_term(config: Config) -> bool:
        return changes(config) or term in OBJECTIVES[config.loss.name].reads

    rules = [Rule(f"loss.{key}", "loss.name", of_term, mend)] if names else []
    if key in _GATES:
        gate, way = _GATES[key]
        rules.append(Rule(f"loss.{key}", f"loss.{gate}", changes, way))
    return rules


RULES += [rule for field in fields(LossConfig) for rule in _of_loss(field.name)]
