"""Who a run is made of: roles, how many actors each has, and what one of them reserves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from conf.judging import TRAINED_KINDS, has_own_judge, pooled_kinds

if TYPE_CHECKING:
    from conf.schema import Config

_MOST = 10**9
"""Actors that are counted: more are refused, and fit in no float."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Role:
    """Actors that are alike.

    Example: ``Role(name="generator", count=2, cpus=1, gpus=1, count_key="generator.num_actors",
    gpus_key="generator.gpus_per_actor")``
    """

    name: str
    count: int
    cpus: float
    """Logical cores that each reserves."""
    gpus: float
    """GPUs that each reserves."""
    count_key: str | None = None
    """None: there is one."""
    gpus_key: str | None = None
    """None: they use no GPUs."""


def roles(config: Config) -> tuple[Role, ...]:
    """Those of a run, in the order in which they are started."""
    learner, generator, judge, scorer = config.learner, config.generator, config.judge, config.scorer
    found = [
        Role(
            name="learner",
            count=1,
            cpus=learner.cpus,
            gpus=learner.gpus,
            gpus_key="learner.gpus",
        ),
        Role(
            name="generator",
            count=min(generator.num_actors, _MOST),
            cpus=generator.cpus_per_actor,
            gpus=generator.gpus_per_actor,
            count_key="generator.num_actors",
            gpus_key="generator.gpus_per_actor",
        ),
    ]
    for kind in pooled_kinds(config):
        trained = kind in TRAINED_KINDS
        found.append(
            Role(
                name=kind,
                count=min(scorer.num_actors, _MOST),
                cpus=scorer.cpus_per_actor,
                gpus=judge.gpus_per_actor if trained else 0,
                count_key="scorer.num_actors",
                gpus_key="judge.gpus_per_actor" if trained else None,
            )
        )
    if has_own_judge(config):
        found.append(
            Role(
                name="judge",
                count=min(judge.num_actors, _MOST),
                cpus=generator.cpus_per_actor,
                gpus=judge.gpus_per_actor,
                count_key="judge.num_actors",
                gpus_key="judge.gpus_per_actor",
            )
        )
    return tuple(found)


def cpus_needed(config: Config) -> float:
    """Logical CPUs that all actors reserve."""
    return sum(role.count * role.cpus for role in roles(config))


def gpus_needed(config: Config) -> float:
    """GPUs that all actors reserve."""
    return sum(role.count * role.gpus for role in roles(config))
