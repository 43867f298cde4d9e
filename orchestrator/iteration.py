"""One iteration as a transaction: collect -> train -> publish -> anchors -> evaluate -> promote.

Everything before `promote` may be thrown away and done again; `promote` writes the checkpoint and then one row of the
ledger, and from that row on the iteration counts. A run that is resumed starts behind the last such row.

    stage      consumes                    produces
    collect    prompts, the data policy    rollouts/*.parquet, pairs/*.parquet, pairs
    train      pairs                       optimizer steps
    publish    the learner's weights       a version that every generator holds
    anchors    held-out prompts            how far the judge that trains agrees with the verifier, if it is another
    evaluate   held-out prompts            accuracy with intervals, KL to the initial model (each `evaluation.every`)
    promote    all of it                   checkpoint, ledger row; the version becomes the next data policy
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from conf.objectives import OBJECTIVES
from orchestrator import batching, metrics
from orchestrator.errors import DeadlineError
from orchestrator.evaluation import anchor_figures, evaluate
from orchestrator.filters import filter_pairs
from orchestrator.remote import fetch, fetch_with_progress
from orchestrator.summary import build_summary, write_summary

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from conf.schema import Config
    from orchestrator.context import Context
    from orchestrator.types import PolicyVersion, PreferencePair, UpdateResult

_PUT_SLICE_S = 1.0  # how long one put waits for room before the learner's health is looked at


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a finished iteration leaves behind."""

    version: PolicyVersion
    num_pairs: int
    metrics: Mapping[str, float]
    """As they were logged."""


class Iteration:
    """Iteration `number`, from the data policy `policy` (the weights that generators and learner now hold)."""

    def __init__(self, context: Context, number: int, policy: PolicyVersion, reference: PolicyVersion) -> None:
        self._context = context
        self._number = number
        self._policy = policy
        self._reference = reference
        self._metrics: dict[str, float] = {}

    def run(self) -> Outcome:
        """Runs all stages."""
        context, number = self._context, self._number
        with context.stage("collect", number):
            pairs = self._collect()
        with context.stage("train", number):
            self._train(pairs)
        with context.stage("publish", number):
            version = context.publisher.publish(number) if pairs else self._policy
        if _has_anchors(context.config):
            with context.stage("anchors", number):
                self._measure_judge()
        if _is_evaluated(context.config, number):
            with context.stage("evaluate", number):
                self._evaluate()
        with context.stage("promote", number):
            self._promote(version)
        return Outcome(version=version, num_pairs=len(pairs), metrics=self._metrics)

    def _collect(self) -> list[PreferencePair]:
        context, config = self._context, self._context.config
        prompts = context.prompts.take(config.pipeline.prompts_per_iteration)
        collected = context.collector.collect(prompts, self._number, self._reference)
        pairs, dropped = filter_pairs(collected.pairs, config.filter)
        context.store.write_pairs(self._number, pairs)
        context.count_tokens(collected.tokens)
        self._metrics |= metrics.rollout_metrics(collected.scored) | context.judge.metrics()
        self._metrics.update(collected.metrics)
        self._metrics |= metrics.pair_metrics(pairs, collected.counts, dropped)
        context.tracker.pairs(pairs)
        return pairs

    def _train(self, pairs: list[PreferencePair]) -> list[UpdateResult]:
        """Packs the pairs, batch by batch as the queue takes them, and feeds the learner through it."""
        context, config = self._context, self._context.config.learner
        learner, queue = context.roles.learner, context.roles.queue
        if not pairs:
            context.tracker.message(f"iteration {self._number}: no pair survived; nothing to train on")
            return []
        batches = [
            part
            for epoch in range(config.epochs)
            for part in batching.batches(
                pairs,
                batch_pairs=config.batch_pairs,
                seed=context.seed("shuffle", self._number),
                epoch=epoch,
                whole_groups=OBJECTIVES[context.config.loss.name].unit == "group",
            )
        ]
        self._call(learner.begin_iteration.remote(self._number, len(batches)), "begin the iteration")
        training = learner.train.remote(queue, len(batches))
        self._feed(batches, training)
        results: list[UpdateResult] = fetch_with_progress(
            training,
            what=f"learner: {len(batches)} optimizer steps",
            deadline_s=config.step_deadline_s * len(batches),
            knob="learner.step_deadline_s",
            on_tick=lambda: self._show_training(len(batches)),
        )
        for result in results:
            context.tracker.log(
                {f"step/{name}": value for name, value in result.metrics.items()},
                iteration=self._number,
                step=result.step,
            )
        context.count_tokens(sum(result.tokens for result in results))
        context.steps = results[-1].step
        self._metrics |= metrics.update_metrics(results)
        return results

    def _feed(self, batches: list[list[PreferencePair]], training: Any) -> None:
        """Puts packed batches into the queue as room appears, and stops as soon as the learner does."""
        deadline_s, loss = self._context.config.learner.step_deadline_s, self._context.config.loss
        mismatched = OBJECTIVES[loss.name].mismatched
        for number, pairs in enumerate(batches):
            packed = batching.pack(pairs, number=number, mismatched=mismatched, include_prompt=loss.include_prompt)
            batch = ray.put(packed)
            end = time.monotonic() + deadline_s
            while not self._context.roles.queue.put(batch, timeout_s=_PUT_SLICE_S):
                self._show_training(len(batches))
                if ray.wait([training], timeout=0)[0]:
                    return
                if time.monotonic() > end:
                    raise DeadlineError(
                        f"learner: took no batch from the queue within {deadline_s:g} s; raise learner.step_deadline_s"
                        " if a step is really that long, or lower learner.batch_pairs"
                    )

    def _show_training(self, total: int) -> None:
        done = self._call(self._context.roles.learner.progress.remote(), "progress")
        self._context.tracker.progress("train", done, total, 0)

    def _measure_judge(self) -> None:
        context = self._context
        self._metrics |= anchor_figures(
            context.rollouts, context.judge, context.examiner, context.test_prompts, context.config, self._number
        )

    def _evaluate(self) -> None:
        context, config = self._context, self._context.config
        last = self._number == config.pipeline.iterations
        prompts = context.test_prompts[: config.evaluation.final_problems if last else config.evaluation.problems]
        evaluation = evaluate(context.rollouts, context.examiner, prompts, config, self._number)
        context.count_tokens(evaluation.tokens)
        self._metrics |= evaluation.metrics()
        samples = evaluation.sampled_completions[: config.evaluation.kl_prompts]
        if samples and config.evaluation.temperature == 1:
            # Completions drawn at another temperature do not come from the policy whose KL is asked for.
            kl = self._call(context.roles.learner.kl_to_initial.remote(samples), "KL to the initial model")
            self._metrics["eval/kl_initial"] = kl

    def _promote(self, version: PolicyVersion) -> None:
        context = self._context
        folder = context.checkpoint(self._number)
        self._call(context.roles.learner.save.remote(str(folder)), f"save {folder.name}")
        self._metrics |= context.stage_metrics()
        # Logged first: lines of an iteration that has no row yet are dropped when the run is resumed.
        context.tracker.log(self._metrics, iteration=self._number, step=context.steps)
        context.ledger.finish_iteration(
            self._number,
            version=version,
            cursor=context.prompts.cursor,
            checkpoint=str(folder.relative_to(context.run_dir)),
            metrics=self._metrics,
        )
        write_summary(context.run_dir, build_summary(context.ledger))
        _prune(folder.parent, keep=context.config.pipeline.keep_checkpoints)

    def _call(self, ref: Any, what: str) -> Any:
        deadline_s = self._context.config.learner.step_deadline_s
        return fetch(ref, what=f"learner: {what}", deadline_s=deadline_s, knob="learner.step_deadline_s")


def _is_evaluated(config: Config, number: int) -> bool:
    """Whether the policy that iteration `number` made answers held-out problems."""
    due = number % config.evaluation.every == 0 or number == config.pipeline.iterations
    return due and config.evaluation.scorer != "none"


def _has_anchors(config: Config) -> bool:
    """Whether the judge that trains can be measured by one that knows the truth."""
    return config.evaluation.anchors > 0 and config.evaluation.scorer == "verifier" and config.scorer.kind != "verifier"


def _prune(folder: Path, keep: int) -> None:
    """Removes all but the newest checkpoints."""
    for old in sorted(path for path in folder.iterdir() if path.is_dir())[:-keep]:
        shutil.rmtree(old)
