"""Puts the parts of a run together."""

from __future__ import annotations

from itertools import chain, islice
from typing import TYPE_CHECKING

from launch.judges import Judges
from launch.placement import start_ray, start_roles
from launch.seeds import load_seeds
from orchestrator.collecting import SampleCollector
from orchestrator.context import Context
from orchestrator.publisher import Publisher
from orchestrator.remote import fetch
from orchestrator.rollouts import Rollouts
from orchestrator.searching import TreeCollector
from orchestrator.store import Store

if TYPE_CHECKING:
    from pathlib import Path

    from conf.schema import Config
    from launch.preflight import Inputs
    from orchestrator.collecting import Collector
    from orchestrator.ledger import Ledger
    from orchestrator.rollouts import Roles
    from orchestrator.tracking import Tracker

PROBE_TOKENS = 64
"""Longest probe: enough for every layer to matter, cheap beside a publication."""


def build_context(config: Config, inputs: Inputs, model_dir: Path, *, ledger: Ledger, tracker: Tracker) -> Context:
    """Starts Ray and all actors, and connects them.

    Raises:
        AgonError: an actor did not start.
    """
    probe = _probe([prompt.token_ids for prompt in inputs.test_prompts], min(PROBE_TOKENS, config.model.max_length))
    start_ray(config)
    seeds = load_seeds(config, model_dir, inputs.tokenizer)
    roles = start_roles(config, model_dir=str(model_dir), probe_token_ids=probe, seeds=seeds)
    _warn_of_padding(roles, tracker, config.learner.start_deadline_s)
    publisher = Publisher(roles, config.cluster.publish_deadline_s)
    judges = Judges(config, roles, inputs, publisher)
    judge = judges.judge()
    rollouts, store = Rollouts(roles, config, tracker), Store(inputs.run_dir)
    collector: Collector = SampleCollector(config, rollouts, judge, store)
    if config.search.kind == "mcts":
        collector = TreeCollector(config, rollouts, judge, store, inputs.tokenizer, judges.evaluator())
    return Context(
        config=config,
        run_dir=inputs.run_dir,
        roles=roles,
        rollouts=rollouts,
        collector=collector,
        judge=judge,
        examiner=judges.examiner(judge),
        publisher=publisher,
        prompts=inputs.prompts,
        test_prompts=inputs.test_prompts,
        store=store,
        ledger=ledger,
        tracker=tracker,
    )


def _warn_of_padding(roles: Roles, tracker: Tracker, deadline_s: float) -> None:
    refused = fetch(
        roles.learner.packing_refused.remote(),
        what="learner: its packing",
        deadline_s=deadline_s,
        knob="learner.start_deadline_s",
    )
    if refused:
        tracker.message(
            f"the learner pads this model's sequences instead of packing them ({refused}): slower, and whole logits of"
            " a micro-batch are held; lower learner.micro_batch_tokens if memory runs short"
        )


def _probe(prompts: list[tuple[int, ...]], length: int) -> tuple[int, ...]:
    """Tokens of held-out prompts, end to end, at most `length` of them."""
    return tuple(islice(chain.from_iterable(prompts), length))
