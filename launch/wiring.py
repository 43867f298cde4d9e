"""Puts the parts of a run together."""

from __future__ import annotations

from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING

from launch.judges import Judges
from launch.placement import start_learner, start_queue, start_ray, start_roles
from launch.seeds import load_seeds
from orchestrator.accounts import Accounts
from orchestrator.archive import Archive
from orchestrator.collecting import SampleCollector
from orchestrator.context import Context
from orchestrator.floor import Floor
from orchestrator.learning import Learning
from orchestrator.profiling import Profile
from orchestrator.publisher import Publisher
from orchestrator.rollouts import Rollouts
from orchestrator.searching import TreeCollector
from orchestrator.store import Store
from orchestrator.training import Training
from orchestrator.waves import Waves

if TYPE_CHECKING:
    from pathlib import Path

    from conf.schema import Config
    from launch.preflight import Inputs
    from orchestrator.collecting import Collector
    from orchestrator.events import Emit
    from orchestrator.ledger import Ledger
    from orchestrator.tracking import Tracker

PROBE_TOKENS = 16
"""Longest probe: every layer and matrix has its part in it, and weights are read once for so few tokens."""


def build_context(
    config: Config, inputs: Inputs, model_dir: Path, *, ledger: Ledger, tracker: Tracker, emit: Emit
) -> Context:
    """Starts Ray and all actors, and connects them.

    Raises:
        AgonError: an actor did not start.
    """
    start_ray(config)
    accounts, store = Accounts(ledger), Store(inputs.run_dir)
    archive = Archive(inputs.run_dir, accounts, emit)
    learning = _learning(config, inputs, model_dir, ledger, accounts, emit)
    roles = start_roles(config, model_dir=str(model_dir), learner=learning, emit=emit)
    _warn_of_padding(learning, tracker)
    publisher = Publisher(roles, accounts, config.cluster)
    quarantined, floor = dict(accounts.quarantined()), Floor()
    judges = Judges(config, roles, inputs, publisher, quarantined)
    judge, rollouts = judges.judge(), Rollouts(roles, config, tracker, quarantined=quarantined)
    collector: Collector = (
        TreeCollector(config, rollouts, judge, store, inputs.tokenizer, judges.evaluator(), quarantined=quarantined)
        if config.search.kind == "mcts"
        else SampleCollector(config, rollouts, judge, store, archive, ledger, floor, quarantined)
    )
    return Context(
        config=config,
        run_dir=inputs.run_dir,
        rollouts=rollouts,
        waves=Waves(
            collector=collector,
            judge=judge,
            filters=config.filter,
            store=store,
            archive=archive,
            ledger=ledger,
            accounts=accounts,
            quarantined=quarantined,
        ),
        judge=judge,
        examiner=judges.examiner(judge),
        publisher=publisher,
        floor=floor,
        bench=Floor(),
        learning=learning,
        training=Training(
            config=config,
            run_dir=inputs.run_dir,
            learning=learning,
            ledger=ledger,
            accounts=accounts,
            store=store,
            tracker=tracker,
            emit=emit,
        ),
        prompts=inputs.prompts,
        test_prompts=inputs.test_prompts,
        store=store,
        archive=archive,
        ledger=ledger,
        accounts=accounts,
        tracker=tracker,
        profile=Profile(inputs.run_dir),
        emit=emit,
    )


def _learning(
    config: Config, inputs: Inputs, model_dir: Path, ledger: Ledger, accounts: Accounts, emit: Emit
) -> Learning:
    prompts = [prompt.token_ids for prompt in inputs.test_prompts]
    start = partial(
        start_learner,
        config,
        model_dir=str(model_dir),
        probe_token_ids=_probe(prompts, min(PROBE_TOKENS, config.model.max_length)),
        seeds=load_seeds(config, model_dir, inputs.tokenizer),
    )
    return Learning(
        config=config,
        run_dir=inputs.run_dir,
        start=start,
        start_queue=partial(start_queue, config),
        ledger=ledger,
        accounts=accounts,
        emit=emit,
    )


def _warn_of_padding(learning: Learning, tracker: Tracker) -> None:
    refused = learning.call("packing_refused", what="its packing")
    if refused:
        tracker.message(
            f"the learner pads this model's sequences instead of packing them ({refused}): slower, and whole logits of"
            " a micro-batch are held; lower learner.micro_batch_tokens if memory runs short"
        )


def _probe(prompts: list[tuple[int, ...]], length: int) -> tuple[int, ...]:
    """Tokens of held-out prompts, end to end, at most `length` of them."""
    return tuple(islice(chain.from_iterable(prompts), length))
