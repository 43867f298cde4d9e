"""The judge that trains and the one that evaluates, put together from a configuration and the actors that are up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from actors.judges.step_judge import StepJudge
from conf.validate import POOLED_KINDS, own_judge_model
from launch.model_files import find_model, folder_version, inspect_model
from launch.tokenizers import load_tokenizer
from orchestrator.errors import ConfigError
from orchestrator.scoring import PooledJudge, PooledTextModel

if TYPE_CHECKING:
    from conf.schema import Config
    from launch.preflight import Inputs
    from orchestrator.judging import Judge, TextModel
    from orchestrator.publisher import Publisher
    from orchestrator.rollouts import Roles


def build_judge(config: Config, roles: Roles, inputs: Inputs, publisher: Publisher) -> Judge:
    """The judge whose word trains.

    Raises:
        ConfigError: `scorer.kind` is not known.
    """
    kind, deadline_s = config.scorer.kind, config.scorer.deadline_s
    if kind in POOLED_KINDS:
        assert roles.scorers is not None
        return PooledJudge(kind, roles.scorers, deadline_s=deadline_s)
    policy = PooledTextModel(
        roles.generators,
        inputs.tokenizer,
        version=lambda: publisher.version,
        template=config.task,
        max_length=config.model.max_length,
        deadline_s=config.judge.deadline_s,
    )
    model = policy if own_judge_model(config) is None else _own_model(config, roles, inputs)
    if kind == "step_judge":
        return StepJudge(model, config.judge)
    raise ConfigError(f"scorer.kind={kind!r} is not known")


def build_examiner(config: Config, roles: Roles, judge: Judge) -> Judge:
    """The judge whose word evaluations report."""
    if roles.examiners is None:
        return judge
    return PooledJudge("verifier", roles.examiners, deadline_s=config.scorer.deadline_s)


def _own_model(config: Config, roles: Roles, inputs: Inputs) -> TextModel:
    """The language model of a judge with engines of its own; with its own tokenizer where it is another model."""
    assert roles.judges is not None
    tokenizer = inputs.tokenizer
    version = "initial"
    if config.judge.model is not None:
        folder = find_model(config.judge.model, "judge.model")
        tokenizer = load_tokenizer(folder, inspect_model(folder).vocab_size)
        version = folder_version(folder).digest
    return PooledTextModel(
        roles.judges,
        tokenizer,
        version=lambda: version,
        template=config.task,
        max_length=config.model.max_length,
        deadline_s=config.judge.deadline_s,
    )
