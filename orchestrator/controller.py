"""The run: publish the initial weights, evaluate, iterate, evaluate, done.

                 +--------------------------- one iteration ----------------------------+
    prompts ---> | generators --groups--> scorers --pairs--> queue --batches--> learner  | --> next iteration
                 |     ^                                                           |    |
                 +-----+------------------- proved weights -----------------------+----+

    who          waits for               unblocked by                     at most
    controller   a wave of completions   every generator's answer         generator.deadline_s
    controller   scores                  every scorer's answer            scorer.deadline_s
    controller   room in the queue       the learner's acknowledgement    learner.step_deadline_s
    learner      a batch                 the controller's put             learner.step_deadline_s
    controller   optimizer steps         the learner's last step          learner.step_deadline_s, each
    controller   proof of new weights    every generator's answer         cluster.publish_deadline_s

`pipeline.mode=sync` is strictly on-policy and takes turns, but for the last checkpoint, which is written while the next
pairs are collected: the same seed gives the same pairs and the same weights on one machine. With `async` the next
groups are made while the learner is trained (`ahead.py`). `iteration.py` holds the stages.
"""

from __future__ import annotations

import math
from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING

from conf.pipeline import max_staleness
from orchestrator.ahead import Ahead
from orchestrator.errors import AgonError, TrainingError
from orchestrator.evaluation import evaluate
from orchestrator.events import Event, EventKind
from orchestrator.iteration import Iteration, keep_answers
from orchestrator.lineage import Lineage
from orchestrator.metrics import ROLLED_BACK
from orchestrator.pace import Pace
from orchestrator.startup import give_back_memory

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from orchestrator.accounts import CheckpointRecord
    from orchestrator.context import Context
    from orchestrator.ledger import FinishedIteration
    from orchestrator.types import PolicyVersion

_MAX_BARREN = 3
"""Iterations in a row that come to nothing before the run stops."""
_TRIM_S = 10.0
"""How often freed memory is given back, at most: what an iteration holds for a moment leaves holes everywhere."""


class Controller:
    """Runs a whole run over actors that are up."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._promoted = self._lineage()

    def run(self) -> None:
        """Runs from where the ledger says that an earlier process stopped, or from the beginning, to the end.

        Raises:
            AgonError: whatever stops the run; nothing that counts is lost.
        """
        context, config = self._context, self._context.config
        if before := context.ledger.resume_point():
            context.learning.version = before.version.number
        checkpoint = context.learning.surviving(context.learning.restore)
        last = context.ledger.resume_point()  # read after it: a checkpoint that is damaged undoes iterations
        if context.ledger.spent():
            context.tracker.rewind(last.iteration + 1 if last else 0)
            self._say_where(last, checkpoint)
        if last:
            self._continue_from(last, checkpoint)
        else:
            self._begin()
        context.profile.note()
        with closing(Ahead(context)) as ahead:
            trims = Pace(_TRIM_S)
            for number in range(last.iteration + 1 if last else 1, config.pipeline.iterations + 1):
                self._check_progress()
                ahead.check()
                ahead.go_on(number, self._promoted)
                self._promoted.add(Iteration(context, ahead, number, self._promoted).run())
                context.profile.note()
                if not trims.left_s:
                    with trims.work():
                        give_back_memory()
        self._check_progress()

    def _lineage(self, versions: Iterable[PolicyVersion] = ()) -> Lineage:
        config = self._context.config
        return Lineage(config.reference, max_staleness=max_staleness(config), versions=versions)

    def _check_progress(self) -> None:
        """Stops a run that gets nowhere, whichever processes its latest iterations ran in."""
        found = islice(self._context.ledger.latest_finished(), _MAX_BARREN)
        latest = [done.metrics for done in found if done.iteration > 0]
        if len(latest) < _MAX_BARREN:
            return
        if all(not metrics.get("pairs/kept") for metrics in latest):
            raise AgonError(f"{_MAX_BARREN} iterations in a row made no pair. {self._why_no_pairs(latest[0])}")
        if all(metrics.get(ROLLED_BACK) for metrics in latest):
            raise TrainingError(
                f"{_MAX_BARREN} iterations in a row were rolled back (events.jsonl says why each time). Look at the"
                " pairs in skipped/, and start a new run with a lower learner.lr, a higher loss.beta, or promotion.*"
                f" that allow more: agon run --config {self._context.run_dir / 'config.yaml'} run_dir=... key=value"
            )

    def _why_no_pairs(self, metrics: Mapping[str, float]) -> str:
        score, scorer = metrics.get("rollout/score_mean", math.nan), self._context.config.scorer
        judge = f"scorer.verifier={scorer.verifier}" if scorer.kind == "verifier" else f"scorer.kind={scorer.kind}"
        abstained, truncated = (metrics[f"rollout/{name}_fraction"] for name in ("abstained", "truncated"))
        return (
            f"In the last one {judge} gave a mean score of {score:.3g},"
            f" abstained on {abstained:.0%} of the completions, and {truncated:.0%} of them ran out of tokens"
            " (rollouts/ has every text with its score). All alike make no pair: is it the right judge, are"
            " generator.max_tokens enough, are the prompts neither too easy nor too hard?"
        )

    def _say_where(self, last: FinishedIteration | None, checkpoint: CheckpointRecord | None) -> None:
        text = f"resumed: {last.iteration} iterations are finished" if last else "resumed at the beginning"
        due = last.iteration + 1 if last else 0
        if checkpoint is not None and checkpoint.iteration == due:
            text += f", and {checkpoint.batches} batches of iteration {checkpoint.iteration} are trained on"
        self._context.emit(Event(kind=EventKind.RESUMED, iteration=due, text=text))

    def _begin(self) -> None:
        context = self._context
        with context.stage("publish", 0) as publishing:
            version = context.publisher.publish(0, 0)
        self._promoted.add(version)
        metrics = publishing.metrics()
        if context.config.evaluation.scorer != "none":
            with context.stage("evaluate", 0) as evaluating:
                evaluation = evaluate(context.rollouts, context.examiner, context.test_prompts, context.config, 0)
                evaluating.tokens = evaluation.tokens
            keep_answers(context, 0, evaluation)
            metrics |= evaluation.metrics() | evaluating.metrics()
        context.ledger.finish_iteration(
            0, version=version, cursor=context.prompts.cursor, checkpoint=None, metrics=metrics
        )
        context.tracker.log(metrics, iteration=0, step=0)

    def _continue_from(self, last: FinishedIteration, checkpoint: CheckpointRecord | None) -> None:
        """Generators get the last promoted weights, unless the learner has gone on from them already."""
        context = self._context
        context.prompts.cursor = last.cursor
        self._promoted = self._lineage(context.ledger.versions())
        context.learning.version = last.version.number
        if checkpoint is not None and checkpoint.iteration > last.iteration:
            return
        with context.stage("publish", last.iteration):
            version = context.publisher.publish(last.version.number, last.iteration)
        if version != last.version:
            raise AgonError(
                f"the checkpoint of iteration {last.iteration} gives weights {version}, the ledger says {last.version}:"
                " one of them was changed after the run stopped"
            )
