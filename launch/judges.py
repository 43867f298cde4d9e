"""The judge that trains and the one that evaluates, put together from a configuration and the actors that are up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from actors.judges.ensemble import build_ensemble
from actors.judges.implicit import build_implicit
from actors.judges.last_step import LastStep
from actors.judges.llm_judge import build_llm_judge
from actors.judges.majority import build_majority
from actors.judges.reliability import Reliability
from actors.judges.step_judge import StepJudge
from conf.judging import POOLED_KINDS, own_language_model, reads_with_own
from launch.model_files import find_model, folder_version, inspect_model
from launch.tokenizers import load_tokenizer
from orchestrator.errors import ConfigError
from orchestrator.scoring import PooledJudge, PooledTextModel, PreviousPolicy

if TYPE_CHECKING:
    from conf.schema import Config
    from launch.preflight import Inputs
    from orchestrator.judging import Judge
    from orchestrator.publisher import Publisher
    from orchestrator.rollouts import Roles


class Judges:
    """Builds judges of any kind over the actors of a run.

    Args:
        config: the run.
        roles: its actors.
        inputs: for the tokenizer.
        publisher: knows which weights the generators hold.
        quarantined: prompts that were set aside, and why; grows as more are.
    """

    def __init__(
        self, config: Config, roles: Roles, inputs: Inputs, publisher: Publisher, quarantined: dict[str, str]
    ) -> None:
        self._config = config
        self._roles = roles
        self._tokenizer = inputs.tokenizer
        self._publisher = publisher
        self._quarantined = quarantined

    def judge(self) -> Judge:
        """The one whose word trains."""
        return self._build(self._config.scorer.kind)

    def examiner(self, judge: Judge) -> Judge:
        """The one whose word evaluations report: a verifier, or the `judge` that trains where that was asked for."""
        return self._build("verifier") if self._config.evaluation.scorer == "verifier" else judge

    def evaluator(self) -> LastStep | None:
        """The one that a search asks about single steps, where it asks anybody."""
        config = self._config
        if not config.search.evaluation_weight:
            return None
        return LastStep(self._reader(), config.search, config.judge, config.seed)

    def _build(self, kind: str) -> Judge:
        config = self._config
        if kind in POOLED_KINDS:
            reliability = None if kind == "verifier" else Reliability()
            of_others = kind == "verifier" and config.scorer.verifier in ("function", "tests")
            return PooledJudge(
                kind,
                self._roles.scorers[kind],
                deadline_s=config.scorer.deadline_s,
                call_s=config.scorer.call_timeout_s + config.scorer.start_deadline_s if of_others else 0.0,
                reliability=reliability,
                quarantined=self._quarantined,
            )
        match kind:
            case "llm_judge":
                return build_llm_judge(config.judge, self._reader(), config.seed)
            case "step_judge":
                return StepJudge(self._reader(), config.judge)
            case "implicit":
                previous = PreviousPolicy(self._roles.learner)
                return build_implicit(config.judge, self._policy(), self._own_model(), previous, config.loss.beta)
            case "majority":
                return build_majority(config.scorer)
            case "ensemble":
                return build_ensemble(config.judge, {member: self._build(member) for member in config.judge.members})
        raise ConfigError(f"scorer.kind={kind!r} is not known")

    def _reader(self) -> PooledTextModel:
        return self._own_model() if reads_with_own(self._config) else self._policy()

    def _policy(self) -> PooledTextModel:
        return PooledTextModel(
            self._roles.generators,
            self._tokenizer,
            version=lambda: self._publisher.version,
            template=self._config.task,
            max_length=self._config.model.max_length,
            deadline_s=self._config.judge.deadline_s,
        )

    def _own_model(self) -> PooledTextModel:
        """The language model of a judge with engines of its own; with its own tokenizer where it is another model."""
        assert self._roles.judges is not None
        config, tokenizer, version = self._config, self._tokenizer, "initial"
        if (named := own_language_model(config)) is not None:
            folder = find_model(named, "judge.model")
            tokenizer = load_tokenizer(folder, inspect_model(folder).vocab_size)
            version = folder_version(folder).digest
        return PooledTextModel(
            self._roles.judges,
            tokenizer,
            version=lambda: version,
            template=config.task,
            max_length=config.model.max_length,
            deadline_s=config.judge.deadline_s,
        )
