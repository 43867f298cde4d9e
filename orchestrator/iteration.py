"""One iteration as a transaction: collect -> train -> publish -> anchors -> evaluate -> settle -> promote.

    stage      consumes                    produces                                                      counts from
    collect    prompts, the data policy    rollouts/*.parquet, pairs/*.parquet, pairs                    each wave
    train      pairs                       weights, and checkpoints/iteration-NNNN on its way to disk    each segment
    publish    the learner's weights       a version that every generator holds                          the proof
    anchors    held-out prompts            how far the judge that trains agrees with the verifier        its end
    evaluate   held-out prompts            accuracy with intervals, KL (each `evaluation.every`)         its end
    settle     -                           checkpoints/iteration-NNNN on disk                            its end
    promote    all of it                   a row of the ledger; the version is the next data policy      the row

What counts is never done again: a run that is resumed goes on within the stage in which it was broken off. The next
pairs are collected from `settle` on.
"""

from __future__ import annotations

import math
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from orchestrator import metrics
from orchestrator.errors import FailureKind, TrainingError, WeightsLostError
from orchestrator.evaluation import anchor_figures, evaluate
from orchestrator.events import Event, EventKind
from orchestrator.metrics import ROLLED_BACK
from orchestrator.promotion import alarms, comparison_figures
from orchestrator.store import read_rollouts
from orchestrator.summary import build_summary, write_summary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conf.schema import Config
    from orchestrator.accounts import CheckpointRecord
    from orchestrator.ahead import Ahead, Gathering
    from orchestrator.context import Context, Stage
    from orchestrator.evaluation import Evaluation
    from orchestrator.lineage import Lineage
    from orchestrator.types import PolicyVersion


class Iteration:
    """Iteration `number`, from the last of the promoted policies, which the learner holds unless it was trained since.

    Args:
        context: of the run.
        ahead: has its pairs.
        number: of the iteration.
        promoted: the policies so far.
    """

    def __init__(self, context: Context, ahead: Ahead, number: int, promoted: Lineage) -> None:
        self._context = context
        self._ahead = ahead
        self._number = number
        self._promoted = promoted
        self._policy = promoted.latest[-1]
        self._metrics: dict[str, float] = {ROLLED_BACK: 0.0}
        self._cursor = 0
        self._is_noted = False

    def run(self) -> PolicyVersion:
        """Runs all stages, from where an earlier process broke off; returns the next data policy."""
        context = self._context
        gathering = self._collect()
        while (version := self._attempt(gathering)) is None:
            pass  # the learner died before its weights were on disk, and those of whoever is trained again may differ
        with context.stage("promote", self._number):
            self._promote(version)
        return version

    def _attempt(self, gathering: Gathering) -> PolicyVersion | None:
        """Trains, and returns the next data policy once it is on disk; None where it was lost before."""
        context = self._context
        try:
            version = self._try(moved=self._train(gathering))
            self._ahead.go_on(self._number + 1, self._promoted.after(version))
            with self._stage("settle"):
                context.training.settle()
        except WeightsLostError:
            if not context.learning.fell_back:
                raise
            return None
        return version

    def _try(self, *, moved: bool) -> PolicyVersion:
        """Publishes what was trained, measures it, and decides which policy the next iteration starts from."""
        context, version = self._context, self._policy
        with ExitStack() as until_decided:
            if context.config.promotion.gate == "reject":
                # Nothing is collected by a policy that may be given up.
                until_decided.enter_context(context.alone())
            if moved:
                version = self._publish()
            if _has_anchors(context.config):
                self._measure("anchors", self._measure_judge)
            if _is_evaluated(context.config, self._number):
                self._measure("evaluate", self._evaluate)
            return self._decide(version)

    @contextmanager
    def _stage(self, name: str) -> Iterator[Stage]:
        with self._context.stage(name, self._number) as stage:
            yield stage
        self._metrics |= stage.metrics()

    def _collect(self) -> Gathering:
        gathering = self._ahead.take(self._number)
        self._cursor = gathering.cursor
        return gathering

    def _train(self, gathering: Gathering) -> bool:
        """Whether new weights came of it."""
        context = self._context
        context.learning.version = self._policy.number
        with self._stage("train") as stage:
            try:
                results = context.training.run(self._number, iter(gathering))
            except TrainingError as error:
                self._note(gathering)
                self._roll_back(str(error))
                return False
            self._note(gathering)
            if not results:
                why = metrics.why_no_pairs(self._metrics)
                context.tracker.message(f"iteration {self._number}: no pair survived ({why}); nothing to train on")
                return False
            stage.tokens = sum(result.tokens for result in results)
            self._metrics |= metrics.update_metrics(results)
            return True

    def _note(self, gathering: Gathering) -> None:
        self._metrics |= gathering.metrics()
        if not self._is_noted:
            self._context.tracker.pairs(gathering.harvest.pairs)
            self._is_noted = True

    def _publish(self) -> PolicyVersion:
        """The learner's weights, as the next version."""
        with self._stage("publish"):
            return self._context.publish(self._policy.number + 1, self._number)

    def _roll_back(self, why: str) -> PolicyVersion:
        """Learner and generators go back to the last promoted policy; what was trained is in no weights any more."""
        self._metrics[ROLLED_BACK] = 1.0
        self._context.training.give_up(self._number)
        self._context.emit(
            Event(
                kind=EventKind.ROLLED_BACK,
                iteration=self._number,
                failure=FailureKind.DATA,
                text=f"iteration {self._number} is rolled back to the policy {self._policy}: {why}",
            )
        )
        # Also after an update that failed: generators of a process that was resumed within it hold no policy yet.
        return self._context.publish(self._policy.number, self._number)

    def _measure(self, name: str, find: Callable[[Stage], None]) -> None:
        """Runs a stage whose figures are all that comes of it, unless they are known already."""
        known = self._context.ledger.finished_phase(self._number, name)
        if known is None:
            with self._context.alone(), self._stage(name) as stage:
                find(stage)
                self._metrics |= stage.figures
        else:
            self._metrics |= known.metrics

    def _measure_judge(self, stage: Stage) -> None:
        context = self._context
        stage.figures |= anchor_figures(
            context.rollouts, context.judge, context.examiner, context.test_prompts, context.config, self._number
        )

    def _evaluate(self, stage: Stage) -> None:
        context, config = self._context, self._context.config
        last = self._number == config.pipeline.iterations
        prompts = context.test_prompts[: config.evaluation.final_problems if last else config.evaluation.problems]
        evaluation = evaluate(context.rollouts, context.examiner, prompts, config, self._number)
        stage.tokens = evaluation.tokens
        stage.figures |= evaluation.metrics() | self._compare(evaluation)
        samples = evaluation.sampled_completions[: config.evaluation.kl_prompts]
        if samples and config.evaluation.temperature == 1:
            # Completions drawn at another temperature do not come from the policy whose KL is asked for.
            what = "KL to the initial model"
            stage.figures["eval/kl_initial"] = context.learning.call("kl_to_initial", samples, what=what)

    def _compare(self, evaluation: Evaluation) -> dict[str, float]:
        """With the answers of the policy before, which were kept; those of this one are kept for the next."""
        context, store = self._context, self._context.store
        keep_answers(context, self._number, evaluation)
        for done in context.ledger.latest_finished():
            before = [store.evaluation_path(done.iteration, kind) for kind in ("greedy", "sampled")]
            if not done.metrics.get(ROLLED_BACK) and all(context.archive.usable(path) for path in before):
                return comparison_figures(
                    evaluation.greedy_answers, evaluation.sampled_answers, *(read_rollouts(path) for path in before)
                )
        return {}

    def _promote(self, version: PolicyVersion) -> None:
        """Makes the iteration count."""
        context = self._context
        checkpoint = context.accounts.latest_checkpoint()
        # Logged first: lines of an iteration that has no row yet are dropped when the run is resumed.
        context.tracker.log(self._metrics, iteration=self._number, step=context.learning.steps)
        context.ledger.finish_iteration(
            self._number,
            version=version,
            cursor=self._cursor,
            checkpoint=checkpoint.path if checkpoint else None,
            metrics=self._metrics,
        )
        write_summary(context.run_dir, build_summary(context.ledger))
        self._prune()

    def _decide(self, version: PolicyVersion) -> PolicyVersion:
        context, config = self._context, self._context.config.promotion
        if config.gate == "off" or version == self._policy:
            return version
        found = alarms(config, self._metrics, (done.metrics for done in context.ledger.latest_finished()))
        for alarm in found:
            text = f"iteration {self._number}: {alarm}"
            context.emit(Event(kind=EventKind.ALARM, iteration=self._number, failure=FailureKind.DATA, text=text))
        if not found or config.gate == "alarm":
            return version
        return self._roll_back("; ".join(found))

    def _prune(self) -> None:
        """Keeps the newest checkpoints, and the one whose policy answered best."""
        context = self._context
        known = context.accounts.checkpoints()
        best = max((record for record in known if self._score(record) > -math.inf), key=self._score, default=None)
        for record in known[: -context.config.pipeline.keep_checkpoints]:
            if record != best:
                context.accounts.drop_checkpoint(record.path)
        context.learning.tidy()

    def _score(self, record: CheckpointRecord) -> float:
        """How well the policy in a checkpoint answered; least where it was not asked or was given up."""
        done = self._context.ledger.finished_iteration(record.iteration)
        if done is None or done.checkpoint != record.path or done.metrics.get(ROLLED_BACK):
            return -math.inf
        return done.metrics.get("eval/greedy_value", -math.inf)


def _is_evaluated(config: Config, number: int) -> bool:
    """Whether the policy that iteration `number` made answers held-out problems."""
    due = number % config.evaluation.every == 0 or number == config.pipeline.iterations
    return due and config.evaluation.scorer != "none"


def _has_anchors(config: Config) -> bool:
    """Whether the judge that trains can be measured by one that knows the truth."""
    return config.evaluation.anchors > 0 and config.evaluation.scorer == "verifier" and config.scorer.kind != "verifier"


def keep_answers(context: Context, iteration: int, evaluation: Evaluation) -> None:
    """Writes the answers of an evaluation, to be compared with later ones and to be read."""
    store = context.store
    paths = [
        store.write_evaluation(iteration, "greedy", evaluation.greedy_answers),
        store.write_evaluation(iteration, "sampled", evaluation.sampled_answers),
    ]
    with context.ledger.transaction():
        context.archive.seal(iteration, paths)
        context.accounts.quarantine(dict(context.rollouts.quarantined), iteration)
